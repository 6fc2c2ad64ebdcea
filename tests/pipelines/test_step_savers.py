"""Step savers: exact where they save nothing, as much work as promised, and the papers' numbers."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines import step_savers
from pipelines.dit import DiTPipeline
from pipelines.learned_range import LearnedRangeScheduler
from pipelines.models.autoencoder import AutoencoderKL
from pipelines.models.dit import DiTTransformer2DModel
from pipelines.models.pixart import TextRun, TextStates
from pipelines.pixart_delta import PixArtDeltaPipeline
from pipelines.pixart_sigma import PixArtSigmaPipeline
from pipelines.step_savers import SAVERS, Forecast, FrozenText, GuidanceInterval, Past, parse

ROOT = Path(__file__).parents[2]
STEPS = 10  # at levels .999, .899, .799, .699, .599, .5, .4, .3, .2, .1


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def shaken(network: Any) -> Any:
    """At initialisation the last layers are as good as silent: guidance and blocks would change nothing."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@pytest.fixture(scope="module")
def pixart(tiny_toy_folder: Path) -> PixArtSigmaPipeline:
    pipeline = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder)
    shaken(pipeline.transformer)
    return pipeline


@pytest.fixture(scope="module")
def dit(tiny_toy_folder: Path) -> DiTPipeline:
    """With the learned variance and the official sampler."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        sample_size=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        out_channels=8,
        num_embeds_ada_norm=4,
    )
    vae = AutoencoderKL.from_pretrained(tiny_toy_folder / "vae")
    return DiTPipeline(vae, shaken(network), LearnedRangeScheduler())


@pytest.fixture(scope="module", params=["pixart", "dit"])
def draw(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """Latents of a picture, drawn by either family."""
    pipeline = request.getfixturevalue(request.param)
    subject = "a red cube" if request.param == "pixart" else 1

    def latents(savers: Any = None, subject: Any = subject, seed: int = 7, **options: Any) -> Tensor:
        given = {} if savers is None else {"savers": savers}
        given |= {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
        if "generator" not in options:
            options["generator"] = seeded(seed)[0]
        return pipeline(subject, **given | options).images

    latents.pipeline, latents.subject = pipeline, subject  # type: ignore[attr-defined]
    return latents


def where_it_works(*texts: str) -> pytest.MarkDecorator:
    """Each text with each family, but for the gate, for which a DiT has no cross-attention."""
    cases = [("pixart", text) for text in texts] + [("dit", text) for text in texts if "tgate" not in text]
    return pytest.mark.parametrize(("draw", "text"), cases, indirect=["draw"])


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """Rows of each call of a module, while the context lasts."""
    rows: list[int] = []
    handle = module.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    try:
        yield rows
    finally:
        handle.remove()


# Off


def test_without_savers_every_bit_is_the_same(draw: Any) -> None:
    expected = draw()
    for nothing in ("", (), []):
        assert torch.equal(draw(nothing), expected)


@where_it_works("guidance=0:1", "taylor=1:2", "tgate=1000", "guidance=0:1,taylor=1:0")
def test_savers_that_save_nothing_change_no_bit(draw: Any, text: str) -> None:
    assert torch.equal(draw(text), draw())


@torch.inference_mode()
def test_the_blocks_of_pixart_run_as_they_are_written_down(pixart: PixArtSigmaPipeline) -> None:
    network = pixart.transformer
    latents_BCYX = torch.randn(2, 4, 16, 12, generator=seeded(0)[0])
    text = network.text_states(torch.randn(4, 5, 32, generator=seeded(1)[0]))
    modulation = network.modulation(torch.tensor([700.0, 300.0]))  # one for each of the two latents
    found = network(latents_BCYX, text=text, modulation=modulation).sample
    doubled = modulation.repeat(2)
    grid = (8, 6)
    x = network.pos_embed(latents_BCYX) + network.positions(*grid, torch.float32, torch.device("cpu"))
    for index, block in enumerate(network.transformer_blocks):
        tables = (doubled if index else modulation).blocks_ES6D[index]
        x = block.attend_image(x, tables, grid)
        x = x if index else x.repeat(2, 1, 1)
        x = block.feed_forward(block.attend_text(x, text, index), doubled.blocks_ES6D[index])
    seen: list[Tensor] = []

    def around(blocks: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        assert len(tokens) == 2
        seen.append(blocks(tokens))
        return seen[0]

    hooked = network(
        latents_BCYX,
        text=text,
        modulation=modulation,
        around=around,
        attend=lambda block, *given: block.attend_text(*given),
    ).sample
    assert torch.equal(seen[0], x)
    assert torch.equal(hooked, found)


# Work


PROMISED = {  # rows of ten steps, for PixArt and for the levels of DiT's own sampler
    "": (20, 20),
    "guidance=0.25:0.75": (15, 14),
    "guidance=0.75:1": (13, 13),
    "taylor=2:1": (12, 12),  # steps 0, 1, 3, 5, 7, 9
    "taylor=3": (10, 10),  # steps 0, 1, 4, 7, 9
    "taylor=3:0": (8, 8),  # steps 0, 3, 6, 9
    "taylor=4:2": (10, 10),  # steps 0, 1, 2, 6, 9
    "taylor=100:0": (4, 4),  # the first and the last
    "tgate=4": (14, None),
    "tgate=1": (11, None),
    # 0, 1 alone; guidance sets in at 3: 3, 4 and 6 with both halves; 8 and 9 alone again
    "guidance=0.25:0.75,taylor=2:1": (10, 10),
}


@where_it_works(*PROMISED)
def test_as_many_rows_are_computed_as_promised(draw: Any, text: str) -> None:
    pipeline = draw.pipeline
    expected = PROMISED[text][isinstance(pipeline, DiTPipeline)]
    with counted(pipeline.transformer.transformer_blocks[1].ff) as rows:
        latents = draw(text)
    assert sum(rows) == expected
    assert torch.isfinite(latents).all()
    assert torch.equal(latents, draw()) == (not text)
    walk = pipeline._walk("default")
    walk.set_timesteps(STEPS)
    plan = pipeline._plan(text, walk.timesteps, 3.0)
    assert len(plan) == (STEPS if text else 0)
    assert not text or step_savers.rows(plan) == expected


def test_a_closed_gate_computes_no_cross_attention(pixart: PixArtSigmaPipeline) -> None:
    def calls(text: str, guidance: float) -> int:
        with counted(pixart.transformer.transformer_blocks[1].attn2) as rows:
            pixart(
                "a red cube",
                negative_prompt="a blue ball",
                num_inference_steps=STEPS,
                guidance_scale=guidance,
                savers=text,
                output_type="latent",
            )
        return sum(rows)

    assert calls("", 3.0) == 20
    assert calls("tgate=4", 3.0) == 8
    assert calls("", 1.0) == 10
    assert calls("tgate=4", 1.0) == 4  # distilled networks have no guidance, but cross-attention


# What they compute


def test_outside_the_interval_a_step_is_one_without_guidance(draw: Any) -> None:
    def walk(**options: Any) -> list[Tensor]:
        given = {"num_inference_steps": STEPS, "generator": seeded(3)[0], "scheduler": "dpm++", **options}
        return [step.latents for step in draw.pipeline.denoise(draw.subject, **given)]

    late = walk(guidance_scale=3.0, savers="guidance=0:0.55")  # from step 5 on
    without, guided = walk(guidance_scale=1.0), walk(guidance_scale=3.0)
    for index in range(STEPS):
        assert torch.equal(late[index], without[index]) == (index < 5)
    assert not torch.equal(late[-1], guided[-1])
    early = walk(guidance_scale=3.0, savers="guidance=0.55:1")
    for index in range(STEPS):
        assert torch.equal(early[index], guided[index]) == (index < 5)


@torch.inference_mode()
def test_behind_the_gate_stands_the_mean_of_both_halves(pixart: PixArtSigmaPipeline) -> None:
    network = pixart.transformer
    captions, mask = pixart.encode(["a blue ball", "two cones", "a red cube", "cone"])
    timesteps = torch.tensor([900, 600, 300])
    first, second = (torch.randn(2, 4, 16, 16, generator=one) for one in seeded(1, 2))
    plan = pixart._plan("tgate=1", timesteps, 3.0)
    predict = pixart.predictor_for(captions, mask, timesteps, {}, 3.0, plan=plan)
    plain = pixart.predictor_for(captions, mask, timesteps, {}, 3.0)
    assert torch.equal(predict(first, 0, timesteps[0]), plain(first, 0, timesteps[0]))

    outputs: list[Tensor] = []
    text, modulation = network.text_states(captions, mask), network.modulation(timesteps)

    def listen(block: Any, x: Tensor, *given: Any) -> Tensor:
        outputs.append(block.attend_text(x, *given) - x)
        return x + outputs[-1]

    network(first, text=text, modulation=modulation.at(0), attend=listen)
    means = tuple((output[:2] + output[2:]) / 2 for output in outputs)
    frozen = TextStates((TextRun(slice(0, 2), constants=means),), 2)
    expected = network(second, text=frozen, modulation=modulation.at(1)).sample[:, :4]
    assert relative(predict(second, 1, timesteps[1]), expected) <= 1e-5
    assert relative(plain(second, 1, timesteps[1]), expected) > 1e-2


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_continues_a_polynomial_exactly(order: int) -> None:
    draws = torch.randn(4, 4, 3, 5, generator=seeded(0)[0])  # coefficients of (B, N, D) changes

    def blocks(index: int, degree: int) -> Callable[[Tensor], Tensor]:
        powers = [draws[power] * (index / 8) ** power for power in range(degree + 1)]
        return lambda tokens: tokens.repeat(2, 1, 1) + sum(powers)

    tokens = torch.randn(2, 3, 5, generator=seeded(1)[0])
    for degree in (order, order + 1):
        past = Past(order)
        for index in (0, 1, 2, 5, 6):  # unevenly spaced
            past.compute(index, True, blocks(index, degree), tokens)
        found = past.forecast(8, True, blocks(8, degree), tokens)
        exact = relative(found, blocks(8, degree)(tokens)) <= 1e-5
        assert exact == (degree == order)


def test_a_forecast_goes_on_with_the_conditional_half(draw: Any) -> None:
    conditional = 0 if isinstance(draw.pipeline, DiTPipeline) else 1
    walk = draw.pipeline._walk("default")
    walk.set_timesteps(STEPS)
    plan = draw.pipeline._plan("guidance=0.75:1,taylor=3:0", walk.timesteps, 3.0)
    assert [call.computed for call in plan[:4]] == [True, False, False, True]
    assert [call.guided for call in plan[:4]] == [True, True, True, False]
    plan = draw.pipeline._plan("guidance=0.85:1,taylor=3:0", walk.timesteps, 3.0)
    assert [(call.computed, call.guided) for call in plan[:3]] == [
        (True, True),
        (False, True),
        (False, False),
    ]
    change = torch.stack([torch.full((3, 5), value) for value in (1.0, 2.0)])
    tokens = torch.zeros(1, 3, 5)
    plan[0].hooks["around"](lambda x: x.repeat(2, 1, 1) + change, tokens)
    found = plan[2].hooks["around"](pytest.fail, tokens)
    assert torch.equal(found, change[conditional : conditional + 1])


def test_more_steps_and_shorter_intervals_come_nearer(draw: Any) -> None:
    """A bound on the drift of a tiny network with random numbers; the benchmark has it for trained ones."""
    for steps, bound in ((20, 0.2), (80, 0.1)):
        given: dict[str, Any] = {"num_inference_steps": steps, "scheduler": "dpm++"}
        expected = draw(**given)
        near, far = (relative(draw(text, **given), expected) for text in ("taylor=2:1", "taylor=5:1"))
        assert 0 < near < bound
        assert near < far


# Company


@where_it_works("guidance=0.25:0.75,taylor=2:1", "tgate=4")
def test_two_runs_at_once_share_nothing(draw: Any, text: str) -> None:
    subjects = ("a blue cone", "a red cube") if draw.subject == "a red cube" else (0, 2)
    options = {"savers": text, "num_inference_steps": STEPS, "guidance_scale": 3.0}
    runs = [
        draw.pipeline.denoise(subject, generator=seeded(seed)[0], **options)
        for seed, subject in enumerate(subjects)
    ]
    together = list(zip(*runs, strict=True))[-1]
    for seed, subject in enumerate(subjects):
        assert torch.equal(together[seed].latents, draw(text, subject=subject, seed=seed))


def test_a_cancelled_run_leaves_nothing_behind(draw: Any) -> None:
    text = "guidance=0.25:0.75,taylor=2:1"
    expected = draw(text)
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "savers": text}
    run = draw.pipeline.denoise(draw.subject, generator=seeded(9)[0], **options)
    list(itertools.islice(run, 4))
    run.close()
    assert torch.equal(draw(text), expected)


def test_a_callback_may_change_the_latents_and_stop(draw: Any) -> None:
    seen: list[int] = []

    def callback(pipeline: Any, index: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(index)
        pipeline.interrupt = index == 6
        return {"latents": given["latents"] * 0.5}

    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "savers": "taylor=3:1"}
    options["callback_on_step_end"] = callback
    steps = list(draw.pipeline.denoise(draw.subject, generator=seeded(1)[0], **options))
    assert seen == list(range(7))
    assert len(steps) == 7 and steps[-1].count == STEPS
    assert draw.pipeline.preview(steps[-1].latents).size == (128, 128)
    plain = list(draw.pipeline.denoise(draw.subject, generator=seeded(1)[0], **{**options, "savers": ""}))
    assert torch.equal(steps[1].latents, plain[1].latents)  # nothing was forecast so far
    assert 0 < relative(steps[2].latents, plain[2].latents) < 0.5


@where_it_works("guidance=0.25:0.75,taylor=2:1", "tgate=4")
def test_picture_n_of_a_batch_is_the_single_picture_of_its_seed(draw: Any, text: str) -> None:
    subjects = ["a red cube", "a small shiny sphere"] if draw.subject == "a red cube" else [1, 3]
    together = draw(text, subject=subjects, num_images_per_prompt=2, generator=seeded(1, 2, 3, 4))
    alone = [draw(text, subject=subjects[n // 2], seed=n + 1) for n in range(4)]
    assert relative(together, torch.cat(alone)) <= 1e-4  # of other shapes, so rounded otherwise
    assert relative(together[:1], together[1:2]) > 1e-2


def test_negative_prompts_of_any_length_go_with_every_saver(pixart: PixArtSigmaPipeline) -> None:
    for text in ("guidance=0.25:0.75,taylor=2:1", "tgate=4"):
        for negative in ("", "metal", "a big blue ring left of a small shiny cone"):
            images = pixart(
                ["a red cube", "cone"],
                negative_prompt=negative,
                num_inference_steps=4,
                savers=text,
                output_type="latent",
            ).images
            assert torch.isfinite(images).all()


def test_half_precision_is_forecast_without_growing(tiny_toy_folder: Path) -> None:
    def latents(dtype: torch.dtype, text: str) -> Tensor:
        pipeline = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder)
        shaken(pipeline.transformer)
        pipeline.to(dtype=dtype)
        options = {"num_inference_steps": STEPS, "output_type": "latent", "generator": seeded(1)[0]}
        return pipeline("a red cube", savers=text, **options).images

    whole, half = (latents(dtype, "taylor=3:2") for dtype in (torch.float32, torch.bfloat16))
    plain = relative(latents(torch.bfloat16, ""), latents(torch.float32, ""))
    assert relative(half, whole) <= 10 * plain


def test_guidance_may_be_left_out_beside_a_control_picture(tiny_delta_folder: Path) -> None:
    pipeline = PixArtDeltaPipeline.from_pretrained(tiny_delta_folder)
    picture = np.zeros((128, 128, 3), np.uint8)
    picture[40:80, 40:80] = 255
    options: dict[str, Any] = {
        "scheduler": "dpm++",
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "control_image": picture,
        "output_type": "latent",
    }
    with counted(pipeline.transformer.transformer_blocks[1].ff) as rows:
        drawn = pipeline("a red cube", savers="guidance=0.25:0.75", generator=seeded(1)[0], **options).images
    assert sum(rows) == 15
    plain = pipeline("a red cube", generator=seeded(1)[0], **options).images
    everywhere = pipeline("a red cube", savers="guidance=0:1", generator=seeded(1)[0], **options).images
    assert torch.equal(everywhere, plain)
    assert not torch.equal(drawn, plain)
    for text in ("taylor=3:1", "tgate=4"):
        with pytest.raises(ValueError, match=f"step saver {text} cannot be used with a control picture"):
            pipeline.check("a red cube", savers=text, **options)
        pipeline.check("a red cube", savers=text, **{**options, "controlnet_conditioning_scale": 0.0})


# Words


def test_reading_savers_loads_no_torch() -> None:
    program = (
        "import sys; import pipelines.step_savers as s; s.parse('taylor=3'); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"


def test_every_row_of_the_table_tells_what_it_is() -> None:
    for name, saver in SAVERS.items():
        assert saver.name == name and saver.form and saver.summary and saver.paper.startswith("arXiv:")


@pytest.mark.parametrize(
    ("text", "savers"),
    [
        ("", ()),
        ("guidance=0.2:0.8", (GuidanceInterval(0.2, 0.8),)),
        ("taylor=3", (Forecast(3, 1),)),
        (" taylor=3:2 , guidance=0:.5 ", (GuidanceInterval(0.0, 0.5), Forecast(3, 2))),
        ("tgate=10", (FrozenText(10),)),
        ("guidance=0.123456789012:1", (GuidanceInterval(0.123456789012, 1.0),)),
    ],
)
def test_savers_are_read_and_written_as_text(text: str, savers: tuple[Any, ...]) -> None:
    assert parse(text) == savers
    assert parse(savers) == savers
    assert parse(",".join(map(str, savers))) == savers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("turbo=3", r"no step saver 'turbo=3'; there are guidance=LOW:HIGH, tgate=STEPS, taylor=INTERVAL"),
        ("taylor", r"taylor is written taylor=INTERVAL\[:ORDER\], not 'taylor'"),
        ("taylor=3:1:2", "is written"),
        ("taylor=x", "is written"),
        ("taylor=2.5", "is written"),
        ("guidance=0.2", "guidance is written guidance=LOW:HIGH, not 'guidance=0.2'"),
        ("guidance=0.2:0.8,", "no step saver ''"),
        ("guidance=0.8:0.2", "0 <= LOW < HIGH <= 1, not guidance=0.8:0.2"),
        ("guidance=0:2", "LOW < HIGH"),
        ("guidance=nan:1", "LOW < HIGH"),
        ("taylor=0", "the interval of taylor must be an integer from 1 to 1000, not 0"),
        ("taylor=3:3", "the order of taylor must be an integer from 0 to 2, not 3"),
        ("tgate=0", "before tgate closes must be an integer from 1 to 1000, not 0"),
        ("taylor=3,taylor=4", "taylor is given twice"),
        ("guidance=0:1,tgate=3", "guidance and tgate do not go together: both decide"),
        ("taylor=3,tgate=3", "taylor and tgate do not go together: a forecast cannot"),
        (["taylor=3"], "a step saver is one of guidance, tgate, taylor, not 'taylor=3'"),
    ],
)
def test_what_is_no_saver_is_refused_before_any_work(draw: Any, text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw.pipeline.check(draw.subject, savers=text)
    with pytest.raises(ValueError, match=message):
        next(draw.pipeline.denoise(draw.subject, savers=text))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("guidance=0.2:0.8", {"guidance_scale": 1.0}, "changes nothing without guidance"),
        (
            "guidance=0.2:0.21",
            {"num_inference_steps": 4},
            r"none of the steps lies in it \(their levels: 0.75, 0.5, 0.25, 0\)",
        ),
    ],
)
def test_savers_without_use_are_refused_before_any_work(
    draw: Any, text: str, options: dict[str, Any], message: str
) -> None:
    given = {"savers": text, "scheduler": "ddim", **options}
    with pytest.raises(ValueError, match=message):
        draw.pipeline.check(draw.subject, **given)
    with pytest.raises(ValueError, match=message):
        next(draw.pipeline.denoise(draw.subject, **given))


def test_dit_has_no_cross_attention_to_freeze(dit: DiTPipeline) -> None:
    with pytest.raises(ValueError, match="freezes cross-attention, and this network has none"):
        dit.check(1, savers="tgate=4")


def test_distilled_walks_have_no_guidance_to_leave_out(tiny_delta_folder: Path) -> None:
    pipeline = PixArtDeltaPipeline.from_pretrained(tiny_delta_folder)
    with pytest.raises(ValueError, match="changes nothing without guidance"):
        pipeline.check("a red cube", savers="guidance=0.2:0.8")
    frozen = pipeline("a red cube", savers="tgate=2", generator=seeded(1)[0], output_type="latent").images
    plain = pipeline("a red cube", generator=seeded(1)[0], output_type="latent").images
    assert 0 < relative(frozen, plain) < 0.5


def test_the_plain_way_leaves_nothing_out(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw.pipeline, "exact", "plain")
    draw.pipeline.check(draw.subject)
    with pytest.raises(ValueError, match="savers leave work out, and plain means that nothing is"):
        draw.pipeline.check(draw.subject, savers="taylor=3")


def test_a_plan_knows_its_rows() -> None:
    call = step_savers.Call(guided=True)
    assert step_savers.rows([call, replace(call, guided=False), replace(call, computed=False)]) == 3
