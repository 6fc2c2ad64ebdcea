"""`gen list`, `show`, `pull`, `verify` and `rm`: weights from the outside. What they do is in gen.pull and
gen.installed, which import huggingface_hub only when the network is asked."""

from __future__ import annotations

import collections
import sys
import time
from pathlib import Path
from typing import Any

import click

from gen import catalog, outputs, printing
from gen.doctor import gib
from gen.errors import GenError
from gen.progress import Progress, duration
from weights import registry, store

JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
QUIET = click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")


# --- looking -----------------------------------------------------------------------------------------


@click.command("list", short_help="Show the models and what is installed.")
@JSON
@click.option("--quiet", "-q", is_flag=True, help="Names of installed weights only.")
def list_command(as_json: bool, quiet: bool) -> None:
    """Show the models, which of their weights are on this machine, and whether they fit it.

    \b
    DISK    what the files take; with ~, what a pull would about bring
    MEMORY  the most that a picture of their own size takes, estimated; the processor's, not a GPU's
    FITS    whether so much is available now; disk: the text encoder is read from the disk meanwhile
    """
    rows = [_weights(row, tag) for row in catalog.MODELS.values() for tag in row.weights]
    if as_json:
        models = [
            {"name": row.name, "summary": row.summary, "makes": row.makes} for row in catalog.MODELS.values()
        ]
        printing.ok({"models": models, "weights": rows})
    elif quiet:
        for row in rows:
            if row["installed"]:
                printing.line(row["name"])
    else:
        _weights_table(rows, "summary")


@click.command("show", short_help="Show a model and the options it takes.")
@click.argument("model")
@JSON
def show_command(model: str, as_json: bool) -> None:
    """Show a model: its weights and the options that it takes."""
    row, tag = catalog.find(model)
    tag = tag or next(iter([*catalog.installed(row), *row.weights]))
    weights = [_weights(row, one) for one in row.weights]
    inputs = row.inputs_for(tag)
    if as_json:
        about = {"name": row.name, "summary": row.summary, "makes": row.makes, "weights": weights}
        printing.ok(about | {"inputs_for": tag, "inputs": [one.to_json() for one in inputs]})
        return
    printing.line(f"{row.name}: {row.summary}\n")
    _weights_table(weights, "source")
    for row_of in weights:
        if row_of["revision"] and row_of["installed"]:
            printing.line(f"{row_of['name']} is revision {row_of['revision']}, pulled {row_of['pulled']}")
    missing = [one["name"] for one in weights if not one["installed"] and one["repository"]]
    if missing:
        printing.line(f"To get more: gen pull {missing[0]}")
    printing.line(f"\nOptions with {row.name}:{tag}")
    table = [("OPTION", "DEFAULT", "LIMITS", "MEANING")]
    for one in inputs:
        default = "(required)" if one.required else one.default_words()
        table.append((f"--{one.name.replace('_', '-')}", default, one.limits(), one.help))
    printing.table(table)


def _weights(row: catalog.Model, tag: str) -> dict[str, Any]:
    from gen import fits

    facts, key = row.checkpoint(tag), row.weights[tag]
    record = store.record(facts.repo_id) if facts.repo_id else {}
    if facts.repo_id:
        source = facts.repo_id
    elif key not in registry.CHECKPOINTS:
        source = f"added: {facts.folder}"
    else:
        source = (
            f"embedded in {facts.folder}" if facts.is_toy else f"yours, in GEN_WEIGHTS_DIR/{facts.folder}"
        )
    return {
        "name": f"{row.name}:{tag}",
        "installed": tag in catalog.installed(row),
        "native_size": facts.native_size if outputs.OUTPUTS[row.makes].sized else None,
        "licence": facts.licence,
        "summary": facts.summary,
        "toy": facts.is_toy,
        "source": source,
        "repository": facts.repo_id,
        "revision": record.get("revision", ""),
        "pulled": record.get("when", ""),
        **fits.fit(key).to_json(),
    }


def _weights_table(rows: list[dict[str, Any]], last: str) -> None:
    header = ("WEIGHTS", "INSTALLED", "SIZE", "DISK", "MEMORY", "FITS", "LICENCE", last.upper())
    printing.table(
        [header]
        + [
            (
                row["name"],
                "yes" if row["installed"] else "-",
                str(row["native_size"] or "-"),
                _bytes(row["disk_bytes"], row["counted"]),
                _bytes(row["memory_bytes"], row["counted"]),
                _fits(row),
                row["licence"],
                row[last],
            )
            for row in rows
        ]
    )


def _bytes(count: int | None, counted: bool) -> str:
    return "-" if count is None else f"{'' if counted else '~'}{gib(count)}"


def _fits(row: dict[str, Any]) -> str:
    if row["fits"] is None:
        return "-"
    return ("disk" if row["text_encoder_from_disk"] else "yes") if row["fits"] else "no"


# --- pulling -----------------------------------------------------------------------------------------


@click.command("pull", short_help="Get published weights.")
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Show the plan, and stop.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of the weights' repository.")
@click.option("--update", is_flag=True, help="The newest revision, where an older one is pinned.")
@JSON
@QUIET
def pull_command(
    name: str, dry_run: bool, revision: str | None, update: bool, as_json: bool, quiet: bool
) -> None:
    """Get published weights, e.g. pixart-sigma:1024, and print their folder.

    The plan comes first: files, bytes, free disk, licence, and what is shared with weights that are here.
    Only what is needed is pulled, into the Hugging Face cache; what is there already is used. A pull that was
    cut off goes on where it ended. Every file is compared with the sum that the hub published, and the
    revision is pinned. HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN mean what they mean elsewhere.
    """
    from gen import pull

    talk = _Talk(quiet)
    if revision and update:
        raise GenError("--revision and --update contradict each other.", "Give one of them.", "bad_input")
    work = pull.plan(name, revision=revision, update=update, say=talk.say)
    if dry_run:
        if as_json:
            printing.ok({"plan": work.to_json()})
        for line in [] if as_json else plan_lines(work):
            printing.line(line)
        return
    for line in [] if quiet else plan_lines(work):
        talk.say(line)
    planned = work.to_json()  # before it is carried out
    try:
        folder = pull.pull(work, talk.show_state, talk.say)
    except KeyboardInterrupt:
        message = "Stopped before the end; what came is kept."
        raise GenError(message, f"To go on: gen pull {name}", "cancelled") from None
    finally:
        talk.clear()
    then = work.then.replace("FILE", _file(work.key, folder))
    if then:
        talk.say(f"These are in the authors' own layout. Before they can be drawn with: {then}")
    if as_json:
        printing.ok({"name": work.name, "folder": str(folder), "then": then, "plan": planned})
    else:
        printing.line(str(folder))


def _file(key: str, folder: Path) -> str:
    return str(folder / next(iter(store.checkpoint(key).files), ""))


def plan_lines(work: Any) -> list[str]:
    """A pull.Plan in words."""
    if work.folder is not None:
        return [f"{work.name} is here already: {work.folder}"]
    lines = [f"{work.name}: {work.count} files, {gib(work.bytes)}; licence {work.licence}"]
    for take in work.takes:
        listing = take.listing
        facts = [f"revision {listing.revision[:12]} ({listing.asked[:40]})"]
        facts += [f"licence {listing.licence}"] if listing.licence else []
        facts += ["gated: its terms must be accepted"] if listing.gated else []
        lines.append(f"  {take.why} from {listing.repo_id}, {', '.join(facts)}")
        lines += [f"    {file.path}  {gib(file.size)}" for file in take.files]
    for part, place in work.shared.items():
        lines.append(f"  {part} is shared with what is here: {place}")
    there = work.bytes - work.missing
    begun = f", {gib(work.begun)} of it from a pull that was cut off" if work.begun else ""
    lines.append(
        f"  to fetch {gib(work.missing)}, here already {gib(there)}{begun}; free disk {gib(work.free)}"
    )
    return lines


class _Talk(Progress):
    """Progress in bytes, with the time that is left by the speed of the last seconds."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(quiet)
        self.seen: collections.deque[tuple[float, int]] = collections.deque(maxlen=200)  # moments, bytes
        self.drawn = 0.0

    def show_state(self, state: Any) -> None:
        """A pull.State; at most ten times a second, and on no terminal every five seconds."""
        now = time.monotonic()
        if (
            self.quiet
            or (self.seen and state.done == self.seen[-1][1])
            or (now - self.drawn < (0.1 if self.live else 5) and state.done < state.total)
        ):
            return
        self.drawn = now
        if self.seen and state.done < self.seen[-1][1]:
            self.seen.clear()  # the next weights, or bytes that proved useless
        self.seen.append((now, state.done))
        while now - self.seen[0][0] > 20:
            self.seen.popleft()
        words = f"{gib(state.done)} of {gib(state.total)}"
        (start, before), passed = self.seen[0], now - self.seen[0][0]
        if passed > 0.5 and state.done > before and state.done < state.total:
            rate = (state.done - before) / (now - start)
            words += f", {rate / 2**20:.1f} MiB/s, {duration((state.total - state.done) / rate)} left"
        bar = f"{self._bar(state.done / max(1, state.total))} " if self.live else ""
        self._draw(f"{bar}{words}, {state.file}", plain=True)


# --- checking ----------------------------------------------------------------------------------------


@click.command("verify", short_help="Check installed weights byte by byte.")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--repair", is_flag=True, help="Pull damaged files again, these alone.")
@JSON
@QUIET
def verify_command(names: tuple[str, ...], repair: bool, as_json: bool, quiet: bool) -> None:
    """Check weights, e.g. pixart-sigma:1024, byte by byte; without a name, all that are installed.

    Every file is compared with the sum that was published with it. Damaged ones are named, with exit code 4;
    --repair pulls these again.
    """
    from gen import installed

    talk, checks, mended = _Talk(quiet), [], []
    try:
        for name in names or installed.names():
            check = installed.verify(name, talk.show_state)
            if check.damages and repair:
                for one in check.damages:
                    talk.say(f"{one.path}: {one.why}; pulling it again")
                mended += installed.repair(check, talk.show_state, talk.say)
                check = installed.verify(name, talk.show_state)
            checks.append(check)
            talk.clear()
            if not as_json:
                printing.line(_check_line(check))
                for one in check.damages:
                    printing.line(f"  {one.path}: {one.why}")
    finally:
        talk.clear()
    damaged = [one for one in checks if one.damages]
    if damaged:
        count = sum(len(one.damages) for one in damaged)
        files = ", ".join(str(two.path) for one in damaged for two in one.damages)
        raise GenError(
            f"{'A file is' if count == 1 else f'{count} files are'} not what was published: {files}.",
            f"Pull {'it' if count == 1 else 'them'} again: gen verify "
            f"{' '.join(one.name for one in damaged)} --repair",
            "corrupt_weights",
        )
    if as_json:
        printing.ok({"weights": [one.to_json() for one in checks], "repaired": [str(one) for one in mended]})


def _check_line(check: Any) -> str:
    rest = f"; {check.unsummed} without a sum, their structure checked" if check.unsummed else ""
    verdict = f"{len(check.damages)} damaged" if check.damages else "whole"
    return (
        f"{check.name}: {verdict}, {check.files} files of {gib(check.bytes)} compared with their sums{rest}"
    )


# --- removing ----------------------------------------------------------------------------------------


@click.command("rm", short_help="Remove weights from this machine.")
@click.argument("name")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Show what would go and what would stay, and stop.")
@JSON
def rm_command(name: str, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Remove weights, e.g. pixart-sigma:512; parts that other installed weights use stay.

    Other programs that read the Hugging Face cache lose the files too. Weights that `gen add` added are
    forgotten, and their files stay where they are.
    """
    from gen import installed, pull

    talk = Progress()
    key, name = pull.find(name)
    if key not in registry.CHECKPOINTS:
        _forget(key, name, dry_run, as_json)
        return
    work = installed.removal(name)
    lines = [f"{name}: {len(work.links)} files go, {gib(work.freed)} are freed"]
    lines += [f"  {place} stays, for {', '.join(users)}" for place, users in work.kept.items()]
    if dry_run:
        if as_json:
            printing.ok({"removal": work.to_json()})
        for line in [] if as_json else lines:
            printing.line(line)
        return
    for line in lines:
        talk.say(line)
    if not yes:
        _ask(name)
    installed.remove(work, talk.say)
    if as_json:
        printing.ok({"removed": work.to_json()})
    else:
        printing.line(f"{name} is removed, {gib(work.freed)} freed")


def _ask(name: str) -> None:
    """Raises bad_input where nobody can be asked, cancelled where the answer is no."""
    if not sys.stdin.isatty():
        raise GenError(
            f"Removing {name} needs a yes, and there is nobody to ask.",
            f"If you mean it: gen rm {name} --yes",
            "bad_input",
        )
    try:
        agreed = click.confirm("Remove?", err=True)
    except click.Abort:  # the end of the input
        agreed = False
    if not agreed:
        raise GenError(f"{name} stays.", "", "cancelled")


def _forget(key: str, name: str, dry_run: bool, as_json: bool) -> None:
    """Weights that `gen add` added: only the studio's own row goes."""
    from gen import added

    facts = store.checkpoint(key)
    if not dry_run:
        added.forget(*name.split(":"))
    words = "would be forgotten" if dry_run else "is forgotten"
    if as_json:
        printing.ok({"forgotten": name, "path": facts.folder, "dry_run": dry_run})
    else:
        printing.line(f"{name} {words}; {facts.folder} stays where it is")
