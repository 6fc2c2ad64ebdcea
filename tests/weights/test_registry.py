import pytest

from weights import registry
from weights.registry import CHECKPOINTS


@pytest.mark.parametrize("row", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_every_checkpoint_says_what_it_is_and_where_from(row):
    assert row.summary
    assert row.licence
    assert bool(row.folder) != bool(row.repo_id)
    own = bool(row.folder and row.family)  # trained or converted by whoever uses it
    assert (row.is_toy or own) == bool(row.recipe)
    assert not (row.is_toy and own)
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


BUILT = {key: row for key, row in CHECKPOINTS.items() if row.network}


@pytest.mark.parametrize("row", BUILT.values(), ids=BUILT)
def test_the_full_size_network_has_the_published_number_of_parameters(row):
    from pipelines import components

    network = components.resolve(components.PARTS[row.network].ours)
    built = network.empty(network.config_class(**row.config))
    assert sum(parameter.numel() for parameter in built.parameters()) == row.parameters
    assert row.bytes == 4 * row.parameters


def test_every_published_checkpoint_has_a_row():
    """The repositories and files that the papers' authors, and DiT's, released for these networks."""
    released = {
        "PixArt-alpha/PixArt-Sigma-XL-2-256x256",
        "PixArt-alpha/PixArt-Sigma-XL-2-512-MS",
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS",
        "PixArt-alpha/PixArt-Sigma",
        "PixArt-alpha/PixArt-LCM-XL-2-1024-MS",
        "PixArt-alpha/PixArt-XL-2-1024-MS",
        "PixArt-alpha/PixArt-LCM-LoRA-XL-2-1024-MS",
        "PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512",
        "PixArt-alpha/PixArt-ControlNet",
        "PixArt-alpha/PixArt-alpha",
        "facebook/DiT-XL-2-256",
        "facebook/DiT-XL-2-512",
    }
    assert {row.repo_id for row in CHECKPOINTS.values() if row.repo_id} == released
