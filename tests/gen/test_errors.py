import ast
import re
from pathlib import Path

import pytest

from gen import pull
from gen.errors import REGISTRY, GenError, cancelled, did_you_mean

ROOT = Path(__file__).resolve().parents[2]


def codes_in_the_source() -> dict[str, str]:
    """Every code that is handed to GenError in gen/ and app/ -> a file that does it."""
    found = {code: "pull.py" for code, _ in pull.KINDS.values()}  # a table of what the hub may answer
    for path in [*(ROOT / "gen").glob("*.py"), *(ROOT / "app").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "GenError":
                codes = [one.value for one in node.keywords if one.arg == "code"] + node.args[2:3]
                # A choice between two literals counts for both.
                for constant in ast.walk(ast.Tuple(elts=codes)):
                    if isinstance(constant, ast.Constant):
                        found[constant.value] = path.name
    return found


def test_every_code_that_is_raised_is_in_the_registry():
    strangers = {code: name for code, name in codes_in_the_source().items() if code not in REGISTRY}
    assert not strangers


def test_every_code_of_the_registry_is_raised_somewhere():
    assert not set(REGISTRY) - set(codes_in_the_source())


def test_the_document_has_exactly_the_registry():
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (.+) \|$", text, re.M)
    documented = {code: (int(exit), int(http), meaning) for code, exit, http, meaning in rows}
    assert documented == {code: (kind.exit, kind.http, kind.meaning) for code, kind in REGISTRY.items()}


def test_a_code_outside_the_registry_cannot_be_raised():
    with pytest.raises(AssertionError, match="REGISTRY"):
        GenError("what", "now", "no_such_code")


def test_an_error_knows_its_exit_code_and_status():
    error = GenError("It is gone.", "Fetch it.", "not_installed")
    assert (error.exit_code, error.http_status) == (3, 409)
    assert error.to_json() == {"code": "not_installed", "message": "It is gone.", "hint": "Fetch it."}
    assert cancelled().exit_code == 130


def test_suggestions_are_given_only_when_something_is_close():
    assert did_you_mean("pixart-sigm", ["pixart-sigma", "dit"]) == "Did you mean pixart-sigma?"
    assert did_you_mean("zzz", ["pixart-sigma", "dit"]) == ""
