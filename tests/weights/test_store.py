import json
import shutil
from pathlib import Path

import pytest

from weights import registry, store
from weights.store import CorruptWeights

NETWORK = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_toy_folder, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_toy_folder, tmp_path / "copy"))


def test_a_whole_folder_passes(folder):
    store.verify(folder)


def test_the_folder_of_the_environment_comes_before_the_packaged_one(folder, tmp_path, monkeypatch):
    (tmp_path / "root" / "toy").mkdir(parents=True)
    folder.rename(tmp_path / "root" / "toy" / "pixart-sigma")
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "root"))
    assert store.find("pixart-sigma-toy") == (tmp_path / "root" / "toy" / "pixart-sigma").resolve()


def test_weights_that_are_nowhere_are_not_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert store.find("pixart-sigma-xl-1024") is None


def test_an_unknown_key_is_a_key_error():
    with pytest.raises(KeyError):
        store.find("nothing-of-this-name")


def test_a_published_checkpoint_is_found_in_the_cache_only_when_complete(folder, tmp_path, monkeypatch):
    repo = tmp_path / "hub" / ("models--" + registry.XL_1024.repo_id.replace("/", "--"))
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123abcd")
    (repo / "snapshots").mkdir()
    folder.rename(repo / "snapshots" / "0123abcd")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert store.find("pixart-sigma-xl-1024") == repo / "snapshots" / "0123abcd"
    shutil.rmtree(repo / "snapshots" / "0123abcd" / "text_encoder")
    assert store.find("pixart-sigma-xl-1024") is None


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "vae/config.json",
        NETWORK,
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
    ],
)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CorruptWeights, match="missing") as caught:
        store.verify(folder)
    assert str((folder / name).parent) in str(caught.value)


def test_a_missing_component_is_named(folder):
    shutil.rmtree(folder / "vae")
    with pytest.raises(CorruptWeights, match=r"vae.*missing"):
        store.verify(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_cut_short_is_noticed(folder, kept):
    path = folder / NETWORK
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CorruptWeights, match=NETWORK):
        store.verify(folder, checksums=False)


def test_a_file_that_is_too_long_is_noticed(folder):
    with (folder / NETWORK).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CorruptWeights, match="promises"):
        store.verify(folder, checksums=False)


def test_a_header_that_claims_more_than_the_limit_is_not_read(folder):
    (folder / NETWORK).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptWeights, match="not a safetensors file"):
        store.verify(folder, checksums=False)


def test_a_pickle_by_another_name_is_called_one(folder):
    import pickle

    (folder / NETWORK).write_bytes(pickle.dumps(["words"] * 99))
    with pytest.raises(CorruptWeights, match="a pickle, and only safetensors are read"):
        store.verify(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode(),
        json.dumps({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}).encode(),
        json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}).encode(),
    ],
    ids=["garbage", "a list", "shape against size", "unknown dtype", "a gap"],
)
def test_a_damaged_header_is_noticed(folder, header):
    (folder / NETWORK).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(CorruptWeights, match=NETWORK):
        store.verify(folder, checksums=False)


def test_a_changed_byte_is_noticed_by_checksum_only(folder):
    store.write_sums(folder)
    store.verify(folder)
    content = bytearray((folder / NETWORK).read_bytes())
    content[-1] ^= 1
    (folder / NETWORK).write_bytes(content)
    store.verify(folder, checksums=False)
    with pytest.raises(CorruptWeights, match=f"{NETWORK}.*SHA-256"):
        store.verify(folder)


@pytest.mark.parametrize("line", ["abc  vae/config.json", f"{'0' * 64}  /etc/passwd", f"{'0' * 64}  ../x"])
def test_a_list_of_checksums_cannot_point_elsewhere(folder, line):
    (folder / store.SUMS).write_text(line + "\n")
    with pytest.raises(CorruptWeights, match=store.SUMS):
        store.verify(folder)


def test_sums_are_what_sha256sum_checks(folder):
    import hashlib

    store.write_sums(folder)
    lines = dict(reversed(line.split("  ")) for line in (folder / store.SUMS).read_text().splitlines())
    assert lines[NETWORK] == hashlib.sha256((folder / NETWORK).read_bytes()).hexdigest()
    assert store.SUMS not in lines


@pytest.mark.parametrize("with_sums", [True, False])
def test_the_fingerprint_tells_other_numbers_apart_and_not_the_place(folder, tmp_path, with_sums):
    if with_sums:
        store.write_sums(folder)
    before = store.fingerprint(folder)
    assert len(before) == 12
    assert store.fingerprint(Path(shutil.copytree(folder, tmp_path / "elsewhere"))) == before
    content = bytearray((folder / NETWORK).read_bytes())
    content[-1] ^= 1  # same header, same size: only the numbers differ
    (folder / NETWORK).write_bytes(content)
    if with_sums:
        store.write_sums(folder)
    assert store.fingerprint(folder) != before


def test_parameters_are_counted_from_headers(folder):
    from safetensors import safe_open

    counted = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            counted += sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118 - no mapping
    assert store.parameters(folder) == counted
