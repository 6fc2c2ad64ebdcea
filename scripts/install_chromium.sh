#!/bin/sh
# Install Chromium for the browser tests, from Debian's packages. Running it again changes nothing.
set -eu

if command -v chromium >/dev/null 2>&1; then
    echo "chromium: $(command -v chromium) is here already" >&2
    exit 0
fi

fail() {
    echo "chromium: $1" >&2
    echo "chromium: the browser tests (tests/app) need it; install the package 'chromium' and run make test again." >&2
    exit 1
}

command -v apt-get >/dev/null 2>&1 || fail "not found, and this system has no apt-get to install it with."
if [ "$(id -u)" -eq 0 ]; then
    as_root=""
elif command -v sudo >/dev/null 2>&1; then
    as_root="sudo"
else
    fail "not found; installing it takes root, and there is no sudo here."
fi

export DEBIAN_FRONTEND=noninteractive
# fonts-dejavu-core: without any font a headless page is a page of empty boxes.
install="$as_root apt-get install --yes --quiet --no-install-recommends chromium fonts-dejavu-core"
echo "chromium: installing it with apt-get" >&2
# A fresh machine may hold no package list, or an old one: then, and only then, fetch it first.
$install >&2 || { $as_root apt-get update --quiet >&2 && $install >&2; } || fail "apt-get could not install it."
command -v chromium >/dev/null 2>&1 || fail "apt-get installed the package, but there is no 'chromium' on PATH."
echo "chromium: $(chromium --version 2>/dev/null || echo installed)" >&2
