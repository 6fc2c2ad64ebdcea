import pytest

from weights import registry
from weights.registry import CHECKPOINTS


@pytest.mark.parametrize("row", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_every_checkpoint_says_what_it_is_and_where_from(row):
    assert row.summary
    assert row.licence
    assert bool(row.folder) != bool(row.repo_id)
    assert row.is_toy == bool(row.recipe)
    assert row.smallest <= row.native_size <= row.largest
    for size in (row.smallest, row.native_size, row.largest):
        assert size % row.size_multiple == 0


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(AssertionError, match="same key"):
        registry.index(registry.TOY, registry.TOY)


def test_a_checkpoint_needs_exactly_one_source():
    facts = {
        "summary": "s",
        "licence": "l",
        "native_size": 8,
        "size_multiple": 8,
        "smallest": 8,
        "largest": 8,
    }
    with pytest.raises(AssertionError, match="folder or a repo_id"):
        registry.Checkpoint(key="k", **facts)
