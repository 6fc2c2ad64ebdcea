import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gen import loader
from gen.catalog import MODELS
from gen.errors import GenError
from gen.request import Settings

ROW = MODELS["pixart-sigma"]
NETWORK = "transformer/diffusion_pytorch_model.safetensors"
CPU = Settings(device="cpu")


@pytest.fixture(autouse=True)
def empty():
    loader.forget()
    yield
    loader.forget()


@pytest.fixture
def folder(tiny_toy_folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(tiny_toy_folder, tmp_path / "copy")


def test_a_pipeline_is_loaded_once(tiny_toy_folder):
    loaded = loader.load(ROW, tiny_toy_folder, CPU)
    assert (loaded.device, loaded.dtype) == ("cpu", "float32")
    assert loader.load(ROW, tiny_toy_folder, CPU) is loaded


def test_the_same_bytes_elsewhere_are_the_same_pipeline(tiny_toy_folder, folder):
    assert loader.load(ROW, folder, CPU) is loader.load(ROW, tiny_toy_folder, CPU)


def test_other_settings_are_another_pipeline(tiny_toy_folder):
    import torch

    plain = loader.load(ROW, tiny_toy_folder, CPU)
    half = loader.load(ROW, tiny_toy_folder, Settings(device="cpu", dtype="bfloat16", attention="math"))
    assert half is not plain
    assert half.pipeline.transformer.dtype == torch.bfloat16
    assert half.attention == "math"
    assert half.bytes * 2 == plain.bytes


def test_changed_weights_are_loaded_again(folder):
    before = loader.load(ROW, folder, CPU)
    tensors = load_file(folder / NETWORK)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / NETWORK, metadata={"format": "pt"})
    after = loader.load(ROW, folder, CPU)
    assert after.fingerprint != before.fingerprint
    assert (after.pipeline.transformer.state_dict()[name] == tensors[name]).all()


def test_only_what_fits_in_memory_is_kept(tiny_toy_folder, monkeypatch):
    first = loader.load(ROW, tiny_toy_folder, CPU)
    monkeypatch.setattr(loader, "memory", lambda device: 2 * first.bytes)  # room for one, as half is used
    second = loader.load(ROW, tiny_toy_folder, Settings(device="cpu", attention="math"))
    assert loader.load(ROW, tiny_toy_folder, Settings(device="cpu", attention="math")) is second
    assert loader.load(ROW, tiny_toy_folder, CPU) is not first


def test_memory_is_that_of_the_machine():
    assert loader.memory("cpu") > 2**28


def test_threads_share_one_load(tiny_toy_folder):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(loader.load(ROW, tiny_toy_folder, CPU)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({id(one) for one in found}) == 1


def test_damaged_weights_are_named_and_nothing_is_kept(folder):
    (folder / NETWORK).write_bytes((folder / NETWORK).read_bytes()[:-1])
    with pytest.raises(GenError, match="diffusion_pytorch_model") as caught:
        loader.load(ROW, folder, CPU)
    assert caught.value.code == "corrupt_weights"
    assert not loader._kept


def test_parts_that_do_not_fit_together_are_corrupt_weights(folder):
    tensors = load_file(folder / NETWORK)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, folder / NETWORK, metadata={"format": "pt"})
    with pytest.raises(GenError) as caught:
        loader.load(ROW, folder, CPU)
    assert caught.value.code == "corrupt_weights"


@pytest.mark.parametrize(
    "settings",
    [Settings(device="mps"), Settings(device="cpu", attention="magic")],
    ids=["device", "attention"],
)
def test_settings_this_machine_cannot_follow_are_bad_input(tiny_toy_folder, settings):
    with pytest.raises(GenError) as caught:
        loader.load(ROW, tiny_toy_folder, settings)
    assert caught.value.code == "bad_input"
    assert caught.value.hint


def test_a_missing_package_is_told_with_the_way_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "needy_pipeline.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(GenError, match="a_package_that_nobody_has") as caught:
        loader.resolve("needy_pipeline:Pipeline")
    assert caught.value.code == "not_installed"


def test_a_missing_module_of_ours_stays_a_bug():
    with pytest.raises(ModuleNotFoundError):
        loader.resolve("pipelines.no_such_file:Pipeline")


def test_large_weights_are_bfloat16_where_the_processor_has_units_for_it() -> None:
    from gen.optim import bfloat16_units

    large = "bfloat16" if bfloat16_units("cpu") else "float32"
    assert loader.choose_device(CPU) == loader.choose_device(CPU, 600_000_000) == ("cpu", large)
    assert loader.choose_device(CPU, loader.SMALL - 1) == ("cpu", "float32")
    assert loader.choose_device(Settings(device="cpu", dtype="float32"), 600_000_000) == ("cpu", "float32")


def test_networks_are_made_ready_unless_plain_is_asked_for(tiny_toy_folder: Path) -> None:
    lean = loader.load(ROW, tiny_toy_folder, CPU)
    plain = loader.load(ROW, tiny_toy_folder, Settings(device="cpu", exact="plain"))
    assert (lean.exact, plain.exact) == ("lean", "plain")
    attention = [one.pipeline.transformer.transformer_blocks[0].attn1 for one in (lean, plain)]
    assert attention[0].to_qkv is not None and attention[1].to_qkv is None


def test_a_text_encoder_that_would_fill_the_memory_stays_on_disk(
    tiny_toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loader.load(ROW, tiny_toy_folder, CPU).offloaded == {}
    least = loader.load(ROW, tiny_toy_folder, Settings(device="cpu", memory="least"))
    assert least.offloaded == {"text_encoder": "file"}
    assert least.pipeline.text_encoder.streamed_on is not None
    whole = loader.needs(tiny_toy_folder, "float32", {})
    assert least.bytes < whole
    monkeypatch.setattr(loader, "memory", lambda _: int(whole / loader.ROOM) - 10)
    assert loader.offloads(tiny_toy_folder, "cpu", "float32") == {"text_encoder": "file"}
    assert loader.offloads(tiny_toy_folder, "cpu", "bfloat16") == {}


def test_all_networks_may_stay_on_disk(tiny_toy_folder: Path) -> None:
    whole = loader.load(ROW, tiny_toy_folder, CPU)
    sequential = loader.load(ROW, tiny_toy_folder, Settings(device="cpu", memory="sequential"))
    assert sequential.offloaded == {"text_encoder": "file", "transformer": "file"}
    draw = {"num_inference_steps": 2, "output_type": "pt", "height": 64, "width": 64}
    pictures = [
        one.pipeline("a red cube", generator=torch.manual_seed(0), **draw).images
        for one in (whole, sequential)
    ]
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-4)  # one of them with joined and packed layers


def test_wishes_that_mean_nothing_are_refused(tiny_toy_folder: Path, tiny_dit_folder: Path) -> None:
    with pytest.raises(GenError, match="no text encoder") as least:
        loader.offloads(tiny_dit_folder, "cpu", "float32", "least")
    assert least.value.code == "bad_input" and "sequential" in least.value.hint
    assert loader.offloads(tiny_dit_folder, "cpu", "float32", "sequential") == {"transformer": "file"}
    with pytest.raises(GenError, match="outside of a GPU"):
        loader.offloads(tiny_toy_folder, "cpu", "float32", "group")
    assert loader.offloads(tiny_toy_folder, "cuda", "float32", "group") == {
        "text_encoder": "file",
        "transformer": "host",
    }
    with pytest.raises(GenError, match="neither quantised nor compiled"):
        Settings(memory="sequential", quantize="int8")
