"""The contract that every row of the catalog keeps; a new row is tested unasked."""

import inspect
from dataclasses import replace

import pytest

from gen import catalog, loader
from gen.catalog import MODELS, published
from gen.errors import GenError
from gen.request import CHECKS, Request
from weights.registry import CHECKPOINTS

ROWS = pytest.mark.parametrize("row", MODELS.values(), ids=MODELS)
WEIGHTS = pytest.mark.parametrize(
    ("row", "tag"),
    [pytest.param(row, tag, id=f"{row.name}:{tag}") for row in MODELS.values() for tag in published(row)],
)


@ROWS
def test_the_pipeline_exists_and_takes_what_the_row_names(row):
    pipeline = loader.resolve(row.pipeline)
    taken = {  # with those that it hands on to the class it grew from
        name
        for one in pipeline.__mro__
        if "denoise" in vars(one)
        for name in inspect.signature(one.denoise).parameters
    }
    for one in row.inputs:
        assert not one.argument or one.argument in taken, f"denoise takes no {one.argument}"
    own = {"image": ("preview",), "cloud": ()}[row.makes]  # the rest is done by gen.outputs
    for verb in ("from_pretrained", "check", "decode", "set_attention", *own):
        assert callable(getattr(pipeline, verb))


@ROWS
def test_inputs_are_complete_and_their_names_single(row):
    names = [one.name for one in row.inputs]
    assert len(set(names)) == len(names)
    assert {"seed", "count"} <= set(names)
    for one in row.inputs:
        assert one.kind in CHECKS
        assert one.label
        assert one.help
        assert one.only_with is None or one.only_with in names
        assert one.by_walk is None or ("" in one.by_walk and one.default is None)
        assert not one.name.startswith("-")


@WEIGHTS
def test_weights_are_in_the_registry(row, tag):
    assert row.weights[tag] in CHECKPOINTS
    assert row.checkpoint(tag).key == row.weights[tag]


@WEIGHTS
def test_defaults_pass_their_own_check(row, tag):
    for one in row.inputs_for(tag):
        if one.default is not None:
            assert one.check(one.default) == one.default
        if one.kind == "size":
            assert one.default == row.checkpoint(tag).native_size


def test_a_name_that_stands_twice_is_refused():
    row = next(iter(MODELS.values()))
    with pytest.raises(AssertionError, match="same name"):
        catalog.index(row, replace(row, summary="another"))


def test_a_reference_is_a_name_and_perhaps_a_tag():
    assert catalog.find("pixart-sigma") == (MODELS["pixart-sigma"], None)
    assert catalog.find("pixart-sigma:toy") == (MODELS["pixart-sigma"], "toy")


@pytest.mark.parametrize(
    ("reference", "hint"),
    [
        ("pixart", "Did you mean pixart-sigma, pixart-delta?"),
        ("", "The models are"),
        ("qqqq", "The models are"),
        ("pixart-sigma:tyo", "Did you mean toy?"),
        ("pixart-sigma:", "Its weights are"),
        ("x" * 10_000, "The models are"),
    ],
)
def test_an_unknown_name_is_met_with_the_known_ones(reference, hint):
    with pytest.raises(GenError) as caught:
        catalog.find(reference)
    assert caught.value.code == "unknown_model"
    assert hint in caught.value.hint
    assert len(caught.value.message) < 200


def test_the_best_installed_weights_are_chosen(installed):
    row = MODELS["pixart-sigma"]
    tag, facts, folder = catalog.choose(row, None)
    assert (tag, facts.key) == ("toy", "pixart-sigma-toy")
    assert (folder / "model_index.json").is_file()
    assert catalog.installed(row) == ["toy"]


def test_weights_that_are_not_here_are_said_to_be_so_with_a_way_to_get_them(installed):
    with pytest.raises(GenError, match="not on this machine") as caught:
        catalog.choose(MODELS["pixart-sigma"], "1024")
    assert caught.value.code == "not_installed"
    assert "gen pull pixart-sigma:1024" in caught.value.hint


def test_a_value_the_model_does_not_take_names_those_that_do(installed):
    with pytest.raises(GenError, match="takes no option 'stepps'") as caught:
        Request.build("pixart-sigma", {"prompt": "x", "stepps": 3})
    assert caught.value.code == "unknown_option"
    assert caught.value.hint == "Did you mean steps, hires_steps, style?"
    narrow = replace(
        MODELS["pixart-sigma"], name="narrow", inputs=(catalog.PROMPT, catalog.SEED, catalog.COUNT)
    )
    assert (
        catalog.not_taken(narrow, "guidance").hint
        == "Models that take it: pixart-sigma, pixart-delta, dit, dit-3d."
    )
