"""The pipeline against the official numbers and against diffusers', and what it promises on top."""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines import Step
from pipelines.dit import DiTPipeline
from pipelines.dpm_solver import DPMSolver
from pipelines.lcm import LCMSolver, OneStep
from pipelines.learned_range import LearnedRangeScheduler
from pipelines.models.autoencoder import AutoencoderKL
from pipelines.models.dit import DiTTransformer2DModel

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "dit_family"
LABELS = {0: "red cube, cube", 1: "blue sphere, Ball", 2: "crane", 3: "crane, heron", 4: "great white shark"}


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    ).eval()


def small(classes: int = 5, scheduler: Any = None, **options: Any) -> DiTPipeline:
    """16 pixels, 8 x 8 latents, random weights of which every part has something to say."""
    chosen = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "out_channels": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            **{**chosen, "sample_size": 8, "num_embeds_ada_norm": classes, **options}
        ).eval()
        vae = small_vae()
    names = LABELS if classes == 5 else None
    return DiTPipeline(vae, transformer, scheduler or LearnedRangeScheduler(), names)


@pytest.fixture(scope="module")
def pipeline() -> DiTPipeline:
    return small()


# The official numbers


def golden_numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy(draw.standard_normal(shape).astype(np.float32))


def golden_pipeline() -> DiTPipeline:
    """The network of the golden cases; its weights are functions of their official names."""
    shapes = json.loads((GOLDEN / "meta.json").read_text())["cases"]["dit_forward"]["state_dict"]
    ours = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "timestep_embedder.linear_1",
        "t_embedder.mlp.2": "timestep_embedder.linear_2",
        "y_embedder": "class_embedder",
        "blocks": "transformer_blocks",
        "attn.proj": "attn1.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "adaLN_modulation.1": "norm1.linear",
        "final_layer.linear": "proj_out_2",
    }
    state = {}
    for key, shape in shapes.items():
        if key == "pos_embed":
            continue
        values = golden_numbers(key, tuple(shape))
        if key.endswith("embedding_table.weight"):
            values = values * 0.5
        elif len(shape) == 1:
            values = values * 0.1
        else:
            values = values * np.float32(1 / np.sqrt(np.prod(shape[1:])))
        for official, name in ours.items():
            key = key.replace(official, name)
        if "attn.qkv" in key:
            for letter, third in zip("qkv", values.chunk(3), strict=True):
                state[key.replace("attn.qkv", f"attn1.to_{letter}")] = third
        else:
            state[key] = values
    pipeline = small(classes=10, num_layers=3, num_attention_heads=4)
    pipeline.transformer.load_state_dict(state, strict=True)
    return pipeline


def distance(found: Tensor, expected: np.ndarray) -> float:
    return np.abs(found.numpy() - expected).max() / max(1.0, np.abs(expected).max())


def test_ten_steps_with_guidance_equal_the_official_code(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, golden = golden_pipeline(), np.load(GOLDEN / "dit_sampling.npz")
    # The first of the two pictures: the second has no class, which guidance has no use for.
    noises = (golden_numbers(f"in:dit.noise.{step}", (4, 4, 8, 8))[:1] for step in itertools.count())
    monkeypatch.setattr(pipeline, "step_noise", lambda latents, generator, guided: next(noises))
    steps = list(
        pipeline.denoise(
            3,
            latents=golden_numbers("in:dit.xT", (2, 4, 8, 8))[:1],
            guidance_scale=4.0,
            guidance_channels=3,
            num_inference_steps=10,
        )
    )
    assert distance(steps[0].latents, golden["after_step0"][:1]) <= 2e-4
    assert distance(steps[5].latents, golden["mid"][:1]) <= 2e-4
    assert distance(steps[-1].latents, golden["final"][:1]) <= 2e-4


# diffusers' numbers


def theirs_of(pipeline: DiTPipeline, folder: Path, scheduler: Any) -> Any:
    """diffusers' pipeline with the same weights, its network's two slips mended."""
    from diffusers import DiTPipeline as Theirs

    pipeline.save_pretrained(folder)
    theirs = Theirs.from_pretrained(folder)
    theirs.scheduler = scheduler
    theirs.set_progress_bar_config(disable=True)
    for block in theirs.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return theirs


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_with_other_schedulers_pictures_equal_diffusers(
    name: str, guidance_scale: float, tmp_path: Path
) -> None:
    import diffusers

    given = {"clip_sample": False} if name == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, name)(**given)
    # 1000 classes, the only number for which diffusers' guidance means what it says
    ours = small(classes=1000, scheduler=DPMSolver() if name.startswith("DPM") else scheduler)
    theirs = theirs_of(ours, tmp_path, scheduler)
    given = {"class_labels": [3, 777], "num_inference_steps": 10, "guidance_scale": guidance_scale}
    expected = theirs(**given, generator=seeded(1)[0], output_type="pt").images
    assert relative(ours(**given, generator=seeded(1)[0], output_type="pt").images, expected) <= 1e-4


def test_the_scheduler_may_be_chosen(pipeline: DiTPipeline) -> None:
    given: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
    solver = small(scheduler=DPMSolver())
    for asked, name, same in ((pipeline, "dpm++", solver), (solver, "learned-range", pipeline)):
        found = asked(0, scheduler=name, generator=seeded(1)[0], **given).images
        assert torch.equal(found, same(0, generator=seeded(1)[0], **given).images)
    assert isinstance(pipeline.scheduler, LearnedRangeScheduler)
    with pytest.raises(ValueError, match="num_inference_steps must be an integer from 2"):
        solver.check(0, scheduler="learned-range", num_inference_steps=1)
    with pytest.raises(ValueError, match="beta_schedule must be 'linear'"):
        small(scheduler=DPMSolver(beta_schedule="scaled_linear")).check(0, scheduler="learned-range")


# What it promises


@pytest.mark.parametrize("scheduler", [LearnedRangeScheduler, DPMSolver])
def test_picture_n_of_a_batch_equals_the_single_picture_of_its_seed(scheduler: Any) -> None:
    pipeline = small(scheduler=scheduler())
    given: dict[str, Any] = {"num_inference_steps": 6, "output_type": "latent"}
    mixed = pipeline([0, 4], num_images_per_prompt=2, generator=seeded(5, 6, 7, 8), **given).images
    for index, (label, seed) in enumerate([(0, 5), (0, 6), (4, 7), (4, 8)]):
        alone = pipeline(label, generator=seeded(seed)[0], **given).images
        assert relative(mixed[index], alone[0]) <= 1e-5
    assert relative(mixed[0], mixed[1]) > 1e-2


def test_the_class_matters_and_so_does_guidance(pipeline: DiTPipeline) -> None:
    """Or else the twins above would agree about nothing."""
    given: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent"}
    drawn = [
        pipeline(label, generator=seeded(7)[0], guidance_scale=scale, **given).images
        for label, scale in ((0, 4.0), (1, 4.0), (0, 1.0))
    ]
    assert relative(drawn[1], drawn[0]) > 1e-2 and relative(drawn[2], drawn[0]) > 1e-2


@torch.inference_mode()
def test_guidance_moves_the_chosen_channels_and_leaves_the_rest_to_the_class(pipeline: DiTPipeline) -> None:
    latents, timesteps = torch.randn(2, 4, 8, 8, generator=seeded(1)[0]), torch.tensor([900, 500, 100])
    labels = [2, 4]
    of_class = pipeline.transformer(latents, 500, torch.tensor(labels)).sample
    of_none = pipeline.transformer(latents, 500, torch.tensor([5, 5])).sample  # 5 classes: 5 is none
    guided = of_none + 3.0 * (of_class - of_none)
    for channels in (1, 3, 4, None):
        predict = pipeline.predictor(labels, timesteps, 3.0, channels)
        found, moved = predict(latents, 1, timesteps[1]), channels or 4
        torch.testing.assert_close(found[:, :moved], guided[:, :moved], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[:, moved:], of_class[:, moved:], rtol=1e-4, atol=1e-5)
    plain = pipeline.predictor(labels, timesteps, 1.0)(latents, 1, timesteps[1])
    torch.testing.assert_close(plain, of_class, rtol=1e-4, atol=1e-5)


def test_tables_computed_in_portions_draw_the_same(
    pipeline: DiTPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"num_inference_steps": 7, "output_type": "latent"}
    expected = pipeline([0, 1, 0], generator=seeded(1)[0], **given).images
    for size in (1, 9000, 20000):  # one step at a time, and some
        monkeypatch.setattr("pipelines.dit.TABLE_BYTES", size)
        assert relative(pipeline([0, 1, 0], generator=seeded(1)[0], **given).images, expected) <= 1e-5


def test_a_run_leaves_the_generator_where_the_official_code_does(pipeline: DiTPipeline) -> None:
    """It walks both halves of a guided batch, each with its own noise."""
    used, counted = seeded(3, 3)
    pipeline([0, 1], generator=used, num_inference_steps=4, output_type="latent")
    torch.randn(2, 4, 8, 8, generator=counted)
    for _ in range(4):
        torch.randn(4, 4, 8, 8, generator=counted)
    assert torch.equal(used.get_state(), counted.get_state())


def test_the_same_seed_gives_the_same_bits_and_runs_leave_nothing_behind(pipeline: DiTPipeline) -> None:
    first = pipeline(0, num_inference_steps=4, generator=seeded(1)).images[0]
    next(pipeline.denoise(1, num_inference_steps=9, guidance_scale=2.0))
    again = pipeline("cube", num_inference_steps=4, generator=seeded(1)).images[0]
    assert np.array_equal(np.asarray(first), np.asarray(again))


def test_steps_count_and_end_where_the_call_does(pipeline: DiTPipeline) -> None:
    steps = list(pipeline.denoise(0, num_inference_steps=4, generator=seeded(1)[0]))
    assert [step.index for step in steps] == [0, 1, 2, 3] and {step.count for step in steps} == {4}
    assert all(isinstance(step, Step) and step.latents.shape == (1, 4, 8, 8) for step in steps)
    assert [int(step.timestep) for step in steps] == [999, 666, 333, 0]
    assert all(step.denoised is not None and step.latents.dtype == torch.float32 for step in steps)
    called = pipeline(0, num_inference_steps=4, generator=seeded(1)[0], output_type="latent").images
    assert torch.equal(called, steps[-1].latents)


def test_closing_the_generator_cancels_before_the_next_step(
    pipeline: DiTPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, forward = itertools.count(), pipeline.transformer.forward

    def counted(*args: Any, **options: Any):
        next(calls)
        return forward(*args, **options)

    monkeypatch.setattr(pipeline.transformer, "forward", counted)
    steps = pipeline.denoise(0, num_inference_steps=20)
    next(steps)
    next(steps)
    steps.close()
    assert next(calls) == 2
    with pytest.raises(StopIteration):
        next(steps)
    assert not torch.is_inference_mode_enabled()


def test_a_callback_sees_every_step_may_change_latents_and_may_stop(pipeline: DiTPipeline) -> None:
    seen = []

    def watch(pipe: DiTPipeline, index: int, timestep: Tensor, tensors: dict[str, Tensor]):
        seen.append((index, sorted(tensors)))
        pipe.interrupt = index == 2
        return {"latents": torch.zeros_like(tensors["latents"])}

    result = pipeline(0, num_inference_steps=20, output_type="latent", callback_on_step_end=watch).images
    assert seen == [(index, ["latents"]) for index in range(3)]
    assert torch.count_nonzero(result) == 0
    assert len(list(pipeline.denoise(0, num_inference_steps=4))) == 4  # the flag does not stick


def test_sizes_other_than_the_native_one_are_drawn(pipeline: DiTPipeline) -> None:
    assert pipeline.native_size == 16 and pipeline.size_multiple == 4
    (picture,) = pipeline(1, height=12, width=32, num_inference_steps=2).images
    assert isinstance(picture, Image.Image) and picture.size == (32, 12)
    (images,) = pipeline([1, 2], num_inference_steps=2, output_type="np", return_dict=False)
    assert images.shape == (2, 16, 16, 3) and 0 <= images.min() <= images.max() <= 1


def test_previews_are_as_large_as_the_picture(pipeline: DiTPipeline) -> None:
    step = next(pipeline.denoise(1, height=12, width=32, num_inference_steps=2))
    assert pipeline.preview(step.latents).size == (32, 12)


def test_every_attention_draws_the_same() -> None:
    drawn = []
    for name in ("sdpa", "math"):
        pipeline = small()
        assert pipeline.set_attention(name) == name
        drawn.append(pipeline(0, num_inference_steps=4, generator=seeded(1)[0], output_type="pt").images)
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)


def test_half_precision_stays_close_and_starts_from_the_same_noise(pipeline: DiTPipeline) -> None:
    half = small().to(dtype=torch.bfloat16)
    given: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt"}
    found = half(0, generator=seeded(1)[0], **given).images
    assert found.dtype == torch.float32
    assert (found - pipeline(0, generator=seeded(1)[0], **given).images).abs().mean() < 0.05


# Names


def test_classes_go_by_number_and_by_name(pipeline: DiTPipeline) -> None:
    assert pipeline.get_label_ids(3) == [3]
    assert pipeline.get_label_ids(["red cube", "Cube", " ball", "4", "heron", "crane, heron"]) == [
        0,
        0,
        1,
        4,
        3,
        3,
    ]


def test_names_can_be_searched(pipeline: DiTPipeline) -> None:
    assert pipeline.find_labels("cube") == [(0, "cube"), (0, "red cube")]
    assert pipeline.find_labels("CRANE") == [(2, "crane"), (3, "crane")]
    assert pipeline.find_labels("shrak") == []
    assert pipeline.find_labels("blu sphere") == [(1, "blue sphere")]
    assert len(pipeline.find_labels("")) == 8


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("crane", r"several classes: 2 \(crane\), 3 \(crane, heron\); give the number"),
        ("spere", "no class is called 'spere'"),
        ("white", "Did you mean great white shark"),
        ("red cub", "Did you mean red cube"),
        ("", "no class is called ''"),
        (5, "there is no class 5; they are numbered from 0 to 4"),
        ("5", "there is no class 5"),
        (-1, "there is no class -1"),
        (True, "by number or by name"),
        (1.0, "must be a class or a list"),
        ([], "must be a class or a list"),
        (None, "must be a class or a list"),
        ([0, None], "by number or by name, not None"),
    ],
)
def test_what_is_no_class_is_refused_with_a_hint(pipeline: DiTPipeline, label: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.get_label_ids(label)
    with pytest.raises(ValueError, match=message):
        next(pipeline.denoise(label))


def test_weights_without_names_take_numbers() -> None:
    with pytest.raises(ValueError, match="have no names; give a number"):
        small(classes=7).get_label_ids("cube")
    assert small(classes=7).get_label_ids("6") == [6]


# Folders


@pytest.mark.parametrize("published", [True, False])
def test_saving_and_loading_draws_the_same(pipeline: DiTPipeline, published: bool, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path, published=published)
    again = DiTPipeline.from_pretrained(tmp_path)
    assert again.id2label == LABELS and isinstance(again.scheduler, LearnedRangeScheduler)
    given: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    expected = pipeline(0, generator=seeded(1)[0], **given).images
    assert torch.equal(again("red cube", generator=seeded(1)[0], **given).images, expected)


@pytest.mark.parametrize("scheduler", [LCMSolver, OneStep, DPMSolver])
def test_every_scheduler_of_ours_comes_back_from_its_folder(scheduler: Any, tmp_path: Path) -> None:
    small(scheduler=scheduler()).save_pretrained(tmp_path)
    assert isinstance(DiTPipeline.from_pretrained(tmp_path).scheduler, scheduler)


def test_diffusers_refuses_the_smaller_file_instead_of_filling_it_up(tmp_path: Path) -> None:
    """Handed the network's folder alone it would take random embedders for the missing ones, and draw."""
    from diffusers import DiTPipeline as Theirs

    small(scheduler=DPMSolver()).save_pretrained(tmp_path, published=False)
    with pytest.raises(ValueError, match="pipelines"):
        Theirs.from_pretrained(tmp_path)


def test_a_folder_that_diffusers_wrote_and_the_older_names_load(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler
    from diffusers import DiTPipeline as Theirs

    ours = small(scheduler=DDIMScheduler(clip_sample=False))
    ours.save_pretrained(tmp_path / "ours")
    labels = {str(number): names for number, names in LABELS.items()}
    Theirs.from_pretrained(tmp_path / "ours", id2label=labels).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model_index.json"
    index = json.loads(path.read_text())
    index |= {"transformer": ["diffusers", "Transformer2DModel"], "id2label": labels}
    path.write_text(json.dumps(index))
    again = DiTPipeline.from_pretrained(tmp_path / "theirs", own_parts=False)
    assert type(again.vae).__module__.startswith("diffusers") and again.id2label == LABELS
    given: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    expected = ours(0, generator=seeded(1)[0], **given).images
    assert relative(again(0, generator=seeded(1)[0], **given).images, expected) <= 1e-4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"_class_name": "PixArtSigmaPipeline"}, "holds a PixArtSigmaPipeline"),
        ({"transformer": ["diffusers", "PixArtTransformer2DModel"]}, "does not belong into a DiTPipeline"),
        ({"id2label": {"5": "ring"}}, "names a class '5', the weights have 0 to 4"),
        ({"id2label": {"x": "ring"}}, "names a class 'x'"),
        ({"id2label": {"1": ["ring"]}}, "must be a text"),
        ({"id2label": ["ring"]}, "id2label must map"),
        ({"scheduler": ["diffusers", "Walk"]}, "scheduler is a Walk, which is not supported"),
    ],
)
def test_folders_that_do_not_fit_are_refused(
    pipeline: DiTPipeline, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match=message):
        DiTPipeline.from_pretrained(tmp_path)


# Refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 0}, "height must be an integer from 8 to 32, not 0"),
        ({"width": 36}, "width must be an integer from 8 to 32"),
        ({"height": 18}, "height must be a multiple of 4, not 18"),
        ({"num_inference_steps": 1}, "num_inference_steps must be an integer from 2 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be an integer from 2 to 1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a number"),
        ({"guidance_channels": 0}, "guidance_channels must be an integer from 1 to 4"),
        ({"guidance_channels": 5}, "guidance_channels must be an integer from 1 to 4"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be"),
        ({"generator": seeded(1, 2)}, "2 generators for 1 pictures"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents must be \(1, 4, 8, 8\)"),
        ({"output_type": "jpeg"}, "output_type must be one of"),
        ({"scheduler": "quick"}, "scheduler must be one of default, .*, learned-range, not 'quick'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "not noise"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_any_work(
    pipeline: DiTPipeline, given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "noise", None)
    with pytest.raises(ValueError, match=message):
        pipeline.check(0, **given)
    with pytest.raises(ValueError, match=message):
        pipeline(0, **given)


def test_weights_that_lack_what_is_asked_are_refused() -> None:
    with pytest.raises(ValueError, match="without the variance that the official sampler needs"):
        small(out_channels=4).check(0)
    small(out_channels=4, scheduler=DPMSolver()).check(0, num_inference_steps=1)
    with pytest.raises(ValueError, match="guidance_scale must be 1 or less"):
        small(class_dropout=False).check(0)
    small(class_dropout=False).check(0, guidance_scale=1.0)


def test_schedules_that_cannot_be_walked_are_refused_before_any_work() -> None:
    from diffusers import DDIMScheduler

    with pytest.raises(ValueError, match="distilled on 50 timesteps and cannot take 60"):
        small(scheduler=LCMSolver()).check(0, num_inference_steps=60)
    taught = small(scheduler=DDIMScheduler(trained_betas=[0.1] * 1000))
    taught.check(0)
    for name in ("learned-range", "dpm++", "euler"):
        with pytest.raises(ValueError, match="trained_betas, which no other scheduler takes over"):
            taught.check(0, scheduler=name)


def test_an_unknown_argument_is_an_error(pipeline: DiTPipeline) -> None:
    with pytest.raises(TypeError, match="sigmas"):
        pipeline(0, sigmas=[1.0])
