"""The web server: one FastAPI app with the page at / and REST under /api, and the `gen serve` command.

Only click and the standard library are imported at the top: `gen --help` imports this module to list the
command, and must not wait for FastAPI and Gradio.
"""

import contextlib
import errno
import ipaddress
import logging
import os
import secrets
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode, urlsplit

import click

from gen.errors import GenError

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

log = logging.getLogger(__name__)

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 7860
COOKIE = "gen_token"
HEALTH = "/api/health"

# What the browser may load: this server and nothing else, so that no component can phone home.
# Gradio compiles its HTML templates in the browser and sets inline styles, hence the two "unsafe" words.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)


class Door:
    """Decides who comes in, and sends every answer out with the same security headers (ASGI middleware).

    - `token` set: every request needs it, as `Authorization: Bearer TOKEN`, as the cookie, or once as
      `?token=TOKEN`, which sets the cookie and goes on to the same address without it.
    - `local_only`: the Host header must name this computer. Without this a web page anywhere could point a
      name of its own at 127.0.0.1 and read what is made here (DNS rebinding), or post forms across sites.
    - the health check is open to everybody and says nothing.
    """

    def __init__(self, app: Any, *, token: str | None, local_only: bool) -> None:
        self.app = app
        self.token = token
        self.local_only = local_only

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer an ASGI request here, or hand it on."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        answer = self.refuse(scope, headers) if scope["path"] != HEALTH else None
        await (answer or self.app)(scope, receive, self.with_headers(send))

    def refuse(self, scope: Any, headers: dict[str, str]) -> Any:
        """Return the response that ends this request here, or None to let it through."""
        from starlette.responses import PlainTextResponse, RedirectResponse

        if self.local_only:
            host = headers.get("host", "")
            if not is_loopback(urlsplit(f"//{host}").hostname or ""):
                return PlainTextResponse("This server answers only to names of this computer.", 421)
            origin = headers.get("origin")
            if origin and urlsplit(origin).netloc != host:
                return PlainTextResponse("Requests from other sites are refused.", 403)
        if self.token is None:
            return None
        if self.token_matches(headers.get("authorization", "").removeprefix("Bearer ")):
            return None
        if self.token_matches(cookie(headers.get("cookie", ""))):
            return None
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if self.token_matches(query.pop("token", [""])[0]):
            rest = urlencode(query, doseq=True)
            answer = RedirectResponse(scope["path"] + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            return answer
        return PlainTextResponse("This server needs its token: open the address that gen serve printed.", 401)

    def token_matches(self, given: str) -> bool:
        """Compare without telling by the time taken how much was right."""
        assert self.token is not None
        return secrets.compare_digest(given.encode(), self.token.encode())

    @staticmethod
    def with_headers(send: Any) -> Any:
        """Wrap ASGI `send` so that every response carries the security headers."""

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"same-origin"),
                ]
            await send(message)

        return send_with_headers


def cookie(header: str) -> str:
    """Return our token cookie's value from a Cookie header, "" when it is not there or unreadable."""
    try:
        morsel = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def is_loopback(host: str) -> bool:
    """True when `host` (a name or an address) can only mean this computer."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def create_app(*, token: str | None = None, local_only: bool = True) -> "FastAPI":
    """Build the whole application: REST, files, and the page at /.

    token       who wants in must show it; None: nobody is asked
    local_only  answer only to requests addressed to this computer's own names
    """
    from gen import library

    # Gradio reads these when a page is built. Its cache of served files belongs with our files, not in the
    # shared temporary folder where other users of the machine can look.
    cache = Path(os.environ.setdefault("GRADIO_TEMP_DIR", str(library.home() / "cache" / "gradio")))
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise library.disk_error(error, cache) from error
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    import gradio
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

    from app import api, look, page, viewer
    from gen import jobs, pictures

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        # The worker is a thread of this process: let it end at its next step rather than be torn apart.
        for job in jobs.list():
            jobs.cancel(job.id)

    app = FastAPI(title="Gen Studio", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.include_router(api.router)

    @app.exception_handler(GenError)
    async def tell(request: Any, error: GenError) -> JSONResponse:
        return JSONResponse({"ok": False, "error": error.to_json()}, error.http_status)

    blocks = page.build()
    # Gradio checks that files which a browser names were uploaded, but only if it believes to be launched.
    # Without this, whoever comes in could name any file of this machine.
    blocks.has_launched = True
    gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        show_error=False,
        run_history=False,
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        max_file_size=pictures.MOST_BYTES,
        theme=look.theme(),
        css=look.CSS,
        head=look.HEAD + viewer.HEAD,
    )
    app.add_middleware(Door, token=token, local_only=local_only)
    return app


def bind(host: str, port: int) -> socket.socket:
    """Take the address before anything slow happens. `port` 0 takes any free one.

    Raises GenError (code "failed") when the port is in use or the address is not this computer's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # A restart must not wait for the kernel to forget the last connections.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise GenError(
                f"Port {port} on {host} is in use by another program.",
                hint=f"Choose another with --port {port + 1}, or let --port 0 find a free one.",
                code="no_server",
            ) from error
        if number == errno.EACCES:
            raise GenError(
                f"Port {port} on {host} needs more rights than this user has.",
                hint="Choose a port above 1023, for instance --port 7860.",
                code="no_server",
            ) from error
        raise GenError(
            f"Cannot listen on {host} port {port}: {error}.",
            hint="--host takes an address of this computer, 127.0.0.1 for instance.",
            code="no_server",
        ) from error
    return listener


def address(listener: socket.socket, token: str | None) -> str:
    """Return the URL to open in a browser for a bound socket."""
    host, port = listener.getsockname()[:2]
    # 0.0.0.0 means "every address" and is no address to visit.
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}/" + (f"?{urlencode({'token': token})}" if token else "")


def runner(app: "FastAPI") -> "uvicorn.Server":
    """The server that runs an app; `run(sockets=[listener])` returns after Ctrl-C."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Open pages hold event streams for ever. Hanging up ends them in good order, where waiting would
            # end in a timeout and a traceback for each.
            for connection in self.server_state.connections:
                connection.transport.close()
            await super().shutdown(sockets)

    return Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, server_header=False))


def serve(*, host: str, port: int, token: str | None, public: bool, open_browser: bool) -> None:
    """Run the server until Ctrl-C. Raises GenError when it may not or cannot listen there."""
    if not is_loopback(host) and not token and not public:
        raise GenError(
            f"Anybody who can reach {host} could use this server, so it wants a token.",
            hint="Add --token WORD (or set GEN_TOKEN). Where something else guards the door, as in a "
            "container or a Space, set GEN_PUBLIC=1.",
            code="bad_input",
        )
    listener = bind(host, port)
    with contextlib.closing(listener):
        running = runner(create_app(token=token, local_only=is_loopback(host) and not public))
        url = address(listener, token)
        click.echo(f"Gen Studio is at {url}\nStop it with Ctrl-C.", err=True)
        if open_browser:
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        # uvicorn ends tidily on Ctrl-C and raises it again; for a server this is the ordinary way to end.
        with contextlib.suppress(KeyboardInterrupt):
            running.run(sockets=[listener])
        click.echo("Stopped.", err=True)


@click.command("serve")
@click.option(
    "--host", envvar="GEN_HOST", default=DEFAULT_HOST, show_default=True, help="Address to listen on."
)
@click.option(
    "--port",
    envvar="GEN_PORT",
    type=click.IntRange(0, 65535),
    default=DEFAULT_PORT,
    show_default=True,
    help="Port to listen on; 0 finds a free one.",
)
@click.option(
    "--token", envvar="GEN_TOKEN", help="Ask every visitor for this word; needed off this computer."
)
@click.option("--open", "open_browser", is_flag=True, help="Open the page in a browser.")
def serve_command(host: str, port: int, token: str | None, open_browser: bool) -> None:
    """Open the page in a browser: draw, watch, look back.

    The page is for this computer only unless --host says otherwise. Any other address needs --token, or
    GEN_PUBLIC=1 where a container or a proxy already decides who comes in.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    public = os.environ.get("GEN_PUBLIC", "") not in ("", "0")
    try:
        serve(host=host, port=port, token=token or None, public=public, open_browser=open_browser)
    except GenError as error:
        click.echo(f"error: {error.message}\n{error.hint}".strip(), err=True)
        raise SystemExit(error.exit_code) from error
