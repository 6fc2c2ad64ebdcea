"""Attention functions: every one equals the written-out one, and reaches every layer of every network."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pipelines import attention, attention_trial, models
from pipelines.attention import ATTENTION, Backend, chosen, remember, set_attention, survey, usable
from pipelines.attention_kernels import math_attention, sdpa_attention
from pipelines.models.dit import DiTTransformer2DModel
from pipelines.models.dit3d import DiT3DModel
from pipelines.models.network import Network
from pipelines.models.pixart import PixArtTransformer2DModel
from pipelines.models.pixart_control import ControlledPixArt, PixArtControlNet

PACKAGES = ("xformers", "flash_attn", "flash_attn_interface", "sageattention")


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_trial, "_verdicts", {})
    monkeypatch.setattr(attention_trial, "_file", None)


@pytest.mark.parametrize("name", usable("cpu"))
@pytest.mark.parametrize("masked", [False, True])
@torch.inference_mode()
def test_every_backend_equals_math(name: str, masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8) for length in (17, 5, 5))
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])[:, None, None] if masked else None
    expected = ATTENTION["math"].attend(q, k, v, mask)
    torch.testing.assert_close(ATTENTION[name].attend(q, k, v, mask), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", [name for name, row in ATTENTION.items() if row.devices == ("cuda",)])
@torch.inference_mode()
def test_every_backend_is_close_to_math_on_a_gpu(name: str) -> None:
    reason = ATTENTION[name].missing("cuda")
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 16, 72)[:, :, 0].transpose(1, 2).cuda().bfloat16() for n in (67, 37, 37))
    exact = math_attention(q.double(), k.double(), v.double())
    error = (ATTENTION[name].attend(q, k, v, None).double() - exact).norm() / exact.norm()
    assert error <= ATTENTION[name].error


def test_masked_keys_weigh_exactly_nothing() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    mask = torch.tensor([True, True, True, False])[None, None, None]
    expected = ATTENTION["math"].attend(q, k[:, :, :3], v[:, :, :3], None)
    torch.testing.assert_close(ATTENTION["math"].attend(q, k, v, mask), expected, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------ the table


def test_on_a_cpu_every_missing_row_says_why() -> None:
    rows = {row.name: row for row in survey("cpu")}
    assert list(rows) == list(ATTENTION)
    assert [name for name, row in rows.items() if row.missing is None] == ["sdpa", "math", "heads"]
    for name, row in rows.items():
        assert row.summary and row.limits
        assert (row.missing is None) == (name in usable("cpu"))
        if row.missing is not None:
            assert "it runs on cuda, not on cpu" in row.missing
    assert rows["xformers"].limits == "cuda, bfloat16 or float16, no masks, heads up to 256 wide"
    assert rows["sdpa"].limits == "any device, any type, masks, heads of any width"


def test_a_package_that_is_not_installed_is_named_with_the_way_to_get_it() -> None:
    row = Backend(attend=math_attention, summary="", package="no_such_package", install="pip install nosuch")
    assert row.missing("cpu") == "no_such_package is not installed (pip install nosuch)"


def test_a_package_that_is_there_and_fails_is_found_out_by_calling_it() -> None:
    def fails(*_: Any) -> Tensor:
        raise ImportError("undefined symbol: _ZN3c10\nand more lines")

    def zeros(q: Tensor, *_: Any) -> Tensor:
        return torch.zeros_like(q)

    row = Backend(attend=fails, summary="", devices=("cpu",))
    assert row.missing("cpu") == "it does not run on this cpu: undefined symbol: _ZN3c10"
    row = Backend(attend=zeros, summary="", devices=("cpu",))
    assert row.missing("cpu") == "what it computes on this cpu is wrong by 100.0%"
    assert Backend(attend=math_attention, summary="", devices=("cpu",)).missing("cpu") is None


def test_a_row_refuses_what_it_cannot_take() -> None:
    row = ATTENTION["flash2"]
    assert row.refuses("cuda", torch.bfloat16, 72) is None
    assert row.refuses("cpu", torch.bfloat16, 72) == "it runs on cuda, not on cpu"
    assert row.refuses("cuda", torch.float32) == "it takes bfloat16 or float16, not float32"
    assert row.refuses("cuda", torch.bfloat16, 72, masked=True) == "it takes no mask"
    assert row.refuses("cuda", torch.bfloat16, 320) == "it takes heads up to 256 wide, not 320"


def test_a_function_says_what_it_does_not_take() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(
        ValueError, match=r"'flash2' cannot compute this: it runs on cuda, not on cpu; choose"
    ):
        ATTENTION["flash2"].attend(q, q, q, None)
    with pytest.raises(ValueError, match=r"'heads' cannot compute this: it takes bfloat16 or float32, not"):
        ATTENTION["heads"].attend(q.half(), q.half(), q.half(), None)


def test_neither_the_import_nor_a_look_at_the_table_imports_optional_packages() -> None:
    program = (
        "import sys; from pipelines import attention; attention.survey('cpu');"
        f"print([name for name in {(*PACKAGES, 'triton', 'torch._dynamo')} if name in sys.modules])"
    )
    root = Path(attention.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


# ---------------------------------------------------------------------------------------------- the networks

PIXART: dict[str, Any] = dict(
    num_layers=2,
    num_attention_heads=1,
    attention_head_dim=8,
    cross_attention_dim=8,
    caption_channels=4,
    sample_size=4,
)


def pixart_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 4, 4),
        "timestep": torch.tensor([10.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 3, 4),
        "encoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }


def run_pixart() -> tuple[list[nn.Module], Any]:
    model = PixArtTransformer2DModel(**PIXART)
    return [model], lambda: model(**pixart_inputs())


def run_control() -> tuple[list[nn.Module], Any]:
    base = PixArtTransformer2DModel(**PIXART)
    control = PixArtControlNet.from_transformer(base, 1)
    both = ControlledPixArt(base, control)
    return [base, control], lambda: both(**pixart_inputs(), control_latents=torch.randn(2, 4, 4, 4))


def run_dit() -> tuple[list[nn.Module], Any]:
    model = DiTTransformer2DModel(
        num_layers=2, num_attention_heads=1, attention_head_dim=8, sample_size=4, num_embeds_ada_norm=3
    )
    numbers, classes = torch.randn(1, 4, 4, 4), torch.tensor([1])
    return [model], lambda: model(numbers, timestep=torch.tensor([9.0]), class_labels=classes)


def run_dit3d(**options: Any) -> tuple[list[nn.Module], Any]:
    model = DiT3DModel(
        num_layers=2,
        num_attention_heads=1,
        attention_head_dim=12,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=3,
        **options,
    )
    points, classes = torch.randn(1, 3, 20), torch.tensor([1])
    return [model], lambda: model(points, timestep=torch.tensor([9.0]), class_labels=classes)


def run_windows() -> tuple[list[nn.Module], Any]:
    return run_dit3d(window_size=2, window_layers=(0,), relative_positions=True)


NETWORKS = {
    "pixart": run_pixart,
    "control": run_control,
    "dit": run_dit,
    "dit-3d": run_dit3d,
    "windows": run_windows,
}
SETTABLE = {"PixArtTransformer2DModel", "PixArtControlNet", "DiTTransformer2DModel", "DiT3DModel"}
# T5 has a bias and no scale. The autoencoder's one layer and HED, which has none, are not chosen for.
OTHERS = {"T5EncoderModel", "AutoencoderKL", "HED"}


def test_every_network_is_either_settable_or_listed_as_not() -> None:
    found: set[str] = set()
    for module in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        for thing in vars(importlib.import_module(module.name)).values():
            if isinstance(thing, type) and issubclass(thing, Network) and thing is not Network:
                found.add(thing.__name__)
    assert found == SETTABLE | OTHERS
    made = {type(one).__name__ for run in NETWORKS.values() for one in run()[0]}
    assert made == SETTABLE


class Strays(TorchFunctionMode):
    """Notes attention that is computed past the function that was set."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("scaled_dot_product_attention", "softmax"):
            self.seen.append(func.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("run", NETWORKS.values(), ids=NETWORKS)
@torch.inference_mode()
def test_every_layer_calls_the_function_that_was_set(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def recording(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        calls.append((q.shape[2], k.shape[2]))
        return q.new_zeros(*q.shape[:3], v.shape[-1])

    torch.manual_seed(0)
    networks, forward = run()
    monkeypatch.setitem(ATTENTION, "recording", Backend(attend=recording, summary=""))
    layers = 0
    for network in networks:
        assert set_attention(network, "recording") == "recording"
        assert chosen(network) == {"all": "recording"}
        layers += sum(hasattr(module, "attend") for module in network.modules())
    with Strays() as strays:
        forward()
    assert strays.seen == []
    assert len(calls) >= layers > 0


@torch.inference_mode()
def test_strays_are_seen() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with Strays() as strays:
        functional.scaled_dot_product_attention(q, q, q)
        q.softmax(-1)
        torch.softmax(q, -1)
    assert strays.seen == ["scaled_dot_product_attention", "softmax", "softmax"]


@pytest.mark.parametrize("name", ["auto", *usable("cpu")])
@pytest.mark.parametrize("run", NETWORKS.values(), ids=NETWORKS)
@torch.inference_mode()
def test_every_network_computes_the_same_with_every_function(run: Any, name: str) -> None:
    torch.manual_seed(0)
    networks, forward = run()
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    found = []
    for choice in ("math", name):
        for network in networks:
            assert set_attention(network, choice) == choice
        torch.manual_seed(1)
        found.append(forward().sample)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_setting_attention_reaches_every_layer_and_no_other_model() -> None:
    model, other = PixArtTransformer2DModel(**PIXART), PixArtTransformer2DModel(**PIXART)
    assert set_attention(model, "math") == "math"
    layers = [module.attend for module in model.modules() if hasattr(module, "attend")]
    assert layers == [ATTENTION["math"].attend] * 4
    assert other.transformer_blocks[0].attn1.attend is ATTENTION["sdpa"].attend
    assert (chosen(model), chosen(other)) == ({"all": "math"}, {"all": "sdpa"})
    assert set_attention(model) == "auto"
    assert chosen(model) == {}


def test_unknown_attention_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"no attention called 'flsh'; there are auto, .*math"):
        set_attention(nn.Linear(1, 1), "flsh")


def test_attention_that_cannot_run_with_this_model_is_refused() -> None:
    model = PixArtTransformer2DModel(**PIXART)
    with pytest.raises(ValueError, match="attention 'cudnn' cannot run here: it runs on cuda, not on cpu"):
        set_attention(model, "cudnn")
    with pytest.raises(
        ValueError, match="'heads' cannot run here: it takes bfloat16 or float32, not float16"
    ):
        set_attention(model.half(), "heads")
    assert chosen(model) == {"all": "sdpa"}


@pytest.mark.parametrize("name", ["math", "auto"])
def test_a_model_without_attention_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no attention layers"):
        set_attention(nn.Linear(1, 1), name)


# ------------------------------------------------------------------------------------------------------ auto


def forbidden(*_: Any) -> Any:
    raise AssertionError("a trial where none can pay")


def of_auto(tokens: int, dtype: torch.dtype, looked_at: int = 0) -> dict[str, str]:
    """What a model of one layer computes with."""
    model = nn.Module()
    model.attend = None  # type: ignore[assignment]
    set_attention(model)
    looked_at = looked_at or tokens
    q, k, v = (torch.randn(2, 6, count, 32).to(dtype) for count in (tokens, looked_at, looked_at))
    found = model.attend(q, k, v, None)
    torch.testing.assert_close(found.float(), math_attention(q, k, v).float(), rtol=0.05, atol=0.02)
    return chosen(model)


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(64, torch.bfloat16), (256, torch.float32), (1, torch.float32)]
)
@torch.inference_mode()
def test_what_is_small_or_has_no_rival_is_neither_measured_nor_looked_up(
    tokens: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_trial, "trial", forbidden)
    monkeypatch.setattr(attention_trial, "_read", forbidden)
    remember(tmp_path / "attention.json")
    assert of_auto(tokens, dtype) == {f"{tokens}x{tokens}": "sdpa"}
    assert not list(tmp_path.iterdir())


@torch.inference_mode()
def test_what_is_large_in_bfloat16_is_measured_once_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "attention.json"
    remember(path)
    first = of_auto(256, torch.bfloat16)
    assert first in ({"256x256": "sdpa"}, {"256x256": "heads"})
    assert path.exists()
    remember(None)
    remember(path)
    monkeypatch.setattr(attention_trial, "trial", forbidden)
    assert of_auto(256, torch.bfloat16) == first


@pytest.mark.parametrize("winner", ["sdpa", "heads"])
@torch.inference_mode()
def test_auto_computes_with_what_won(winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WORTH", 1)
    loser = "heads" if winner == "sdpa" else "sdpa"
    times = {ATTENTION[winner].attend: 1.0, ATTENTION[loser].attend: 2.0}
    monkeypatch.setattr(attention_trial, "_seconds", lambda attend, _: times[attend])
    assert of_auto(40, torch.bfloat16, 7) == {"40x7": winner}
    q, k, v = torch.randn(3, 2, 6, 40, 32).bfloat16().unbind()
    found = attention.Auto()(q, k, v)
    assert torch.equal(found, ATTENTION[winner].attend(q, k, v, None))
    assert not torch.equal(found, ATTENTION[loser].attend(q, k, v, None))  # they round differently


def test_with_gradients_auto_is_sdpa_and_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WORTH", 1)
    monkeypatch.setattr(attention_trial, "trial", forbidden)
    model = DiTTransformer2DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=8, sample_size=4, num_embeds_ada_norm=3
    ).bfloat16()
    set_attention(model)
    with torch.no_grad():  # at initialisation gates are zero and nothing reaches the attention
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    numbers = torch.randn(1, 4, 4, 4).bfloat16()
    out = model(numbers, timestep=torch.tensor([9.0]), class_labels=torch.tensor([1])).sample
    out.float().square().sum().backward()
    assert chosen(model) == {"4x4": "sdpa"}
    gradient = model.transformer_blocks[0].attn1.to_v.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_sdpa_is_what_a_compiler_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WORTH", 1)
    monkeypatch.setattr(attention_trial, "trial", forbidden)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    q, k, v = torch.randn(3, 1, 2, 4, 8).bfloat16().unbind()
    assert torch.equal(attention.Auto()(q, k, v), sdpa_attention(q, k, v))
