"""The pipeline of clouds on small real networks: its units, its schedulers, completion and interpolation."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines import Step
from pipelines.dit3d import DiT3DPipeline
from pipelines.dpm_solver import DPMSolver
from pipelines.models.dit3d import DiT3DModel
from pipelines.point_diffusion import AIRPLANE, PointDiffusion

LABELS = {0: "airplane, plane", 1: "chair", 2: "mug"}
MEAN, STD = (0.1, -0.2, 0.05), 0.17
POINTS = 64
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def small(scheduler: Any = None, **options: Any) -> DiT3DPipeline:
    """8 voxels per side, 64 tokens, random weights. They answer v unless the scheduler says otherwise: of an
    untrained network's noise a cloud becomes a hundred times as large as one."""
    chosen = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "num_embeds_ada_norm": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DiT3DModel(**{**chosen, "sample_size": 8, "patch_size": 2, **options}).eval()
    return DiT3DPipeline(
        transformer, scheduler or DPMSolver(prediction_type="v_prediction"), LABELS, mean=MEAN, std=STD
    )


@pytest.fixture(scope="module")
def pipeline() -> DiT3DPipeline:
    return small()


def draw(pipeline: DiT3DPipeline, labels: Any = 1, **options: Any) -> np.ndarray:
    given = {"num_points": POINTS, "num_inference_steps": 4, "generator": seeded(1)[0]}
    return pipeline(labels, **{**given, **options}).clouds


def known_points(*shape: int) -> np.ndarray:
    """Some, of the size of the data."""
    drawn = np.random.default_rng(0).standard_normal((*shape, 3)) * STD + np.array(MEAN)
    return drawn.astype(np.float32)


# What comes out


def test_a_cloud_comes_out_in_the_units_of_the_data(pipeline: DiT3DPipeline) -> None:
    cloud = draw(pipeline)
    assert cloud.shape == (1, POINTS, 3) and cloud.dtype == np.float32 and np.isfinite(cloud).all()
    latents = draw(pipeline, output_type="latent")
    assert latents.shape == (1, 3, POINTS)
    np.testing.assert_allclose(cloud[0], latents[0].T.numpy() * STD + np.array(MEAN), atol=1e-6)
    tensor = draw(pipeline, output_type="pt")
    assert isinstance(tensor, Tensor) and np.array_equal(tensor.numpy(), cloud)
    (bare,) = pipeline(1, num_points=POINTS, num_inference_steps=4, generator=seeded(1)[0], return_dict=False)
    assert np.array_equal(bare, cloud)


def test_encoding_undoes_decoding(pipeline: DiT3DPipeline) -> None:
    latents = torch.randn(2, 3, 9, generator=seeded(0)[0])
    torch.testing.assert_close(pipeline.encode(pipeline.decode(latents)), latents, **CLOSE)


def test_steps_count_and_end_where_the_call_does(pipeline: DiT3DPipeline) -> None:
    given = {"num_points": POINTS, "num_inference_steps": 4, "generator": seeded(1)[0]}
    steps = list(pipeline.denoise(1, **given))
    assert [step.index for step in steps] == [0, 1, 2, 3] and {step.count for step in steps} == {4}
    assert all(isinstance(step, Step) and step.latents.shape == (1, 3, POINTS) for step in steps)
    assert all(step.denoised is not None and step.latents.dtype == torch.float32 for step in steps)
    assert np.array_equal(pipeline.decode(steps[-1].latents), draw(pipeline))


@pytest.mark.parametrize("scheduler", ["default", "ddpm"])
def test_a_batch_draws_what_its_clouds_are_alone(pipeline: DiT3DPipeline, scheduler: str) -> None:
    labels = ["mug", 0, 1]
    together = draw(pipeline, labels, generator=seeded(5, 6, 7), scheduler=scheduler)
    for row, (label, generator) in enumerate(zip(labels, seeded(5, 6, 7), strict=True)):
        alone = draw(pipeline, label, generator=generator, scheduler=scheduler)[0]
        np.testing.assert_allclose(together[row], alone, atol=1e-5)
    assert not np.allclose(together[0], together[1], atol=1e-2)


def test_the_same_seed_gives_the_same_bits_and_runs_leave_nothing_behind(pipeline: DiT3DPipeline) -> None:
    first = draw(pipeline)
    next(pipeline.denoise(0, num_inference_steps=9, num_points=20, guidance_scale=2.0))
    assert np.array_equal(draw(pipeline, "Chair"), first)


def test_closing_the_generator_cancels_before_the_next_step(
    pipeline: DiT3DPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = pipeline.transformer.forward
    monkeypatch.setattr(
        pipeline.transformer, "forward", lambda *args, **given: calls.append(1) or forward(*args, **given)
    )
    steps = pipeline.denoise(1, num_points=POINTS, num_inference_steps=9)
    next(steps)
    next(steps)
    steps.close()
    assert len(calls) == 2 and list(steps) == []


def test_a_callback_sees_changes_and_stops(pipeline: DiT3DPipeline) -> None:
    seen = []

    def callback(given: DiT3DPipeline, index: int, timestep: Tensor, chosen: dict[str, Tensor]) -> dict:
        seen.append((index, int(timestep)))
        given.interrupt = index == 1
        return {"latents": torch.zeros_like(chosen["latents"])}

    steps = list(pipeline.denoise(1, num_points=8, num_inference_steps=5, callback_on_step_end=callback))
    assert [index for index, _ in seen] == [0, 1] and len(steps) == 2 and not steps[-1].latents.any()


# Guidance


def test_guidance_of_one_is_none(pipeline: DiT3DPipeline) -> None:
    plain = draw(pipeline, guidance_scale=1.0)
    assert np.array_equal(draw(pipeline), plain)
    assert np.array_equal(draw(pipeline, guidance_scale=0.0), plain)
    assert np.array_equal(draw(small(class_dropout=False), guidance_scale=1.0).shape, plain.shape)
    np.testing.assert_allclose(draw(pipeline, guidance_scale=1.0 + 1e-6), plain, atol=1e-4)
    assert not np.allclose(draw(pipeline, guidance_scale=4.0), plain, atol=1e-2)


def test_guidance_moves_the_answer_away_from_that_of_no_class(pipeline: DiT3DPipeline) -> None:
    timesteps = torch.tensor([900, 300])
    latents = torch.randn(2, 3, POINTS, generator=seeded(0)[0])
    with torch.inference_mode():
        of_class, of_none = (
            pipeline.transformer(latents, 300, torch.tensor(labels)).sample for labels in ([0, 2], [3, 3])
        )
        found = pipeline.predictor([0, 2], timesteps, 2.5)(latents, 1, timesteps[1])
    torch.testing.assert_close(found, of_none + 2.5 * (of_class - of_none), rtol=1e-4, atol=1e-5)


# Schedulers


class Known(torch.nn.Module):
    """A network whose answer is known: clouds of one Gaussian around `centre`, of deviation `width`."""

    def __init__(self, kind: str, centre: Tensor, width: float) -> None:
        super().__init__()
        self.kind, self.centre, self.width = kind, centre[None, :, None], width
        self.signal = DPMSolver().config.signal(torch.float64)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The mean of the noise, given the noisy cloud, in the words of `kind`."""
        signal = torch.lerp(
            self.signal[int(timestep)], self.signal[min(int(timestep) + 1, 999)], float(timestep) % 1
        )
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        x = latents.double()
        share = alpha * self.width**2 / (alpha**2 * self.width**2 + sigma**2)
        cloud = self.centre + share * (x - alpha * self.centre)
        noise = (x - alpha * cloud) / sigma
        return (noise if self.kind == "epsilon" else alpha * noise - sigma * cloud).float()


CENTRE, WIDTH = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64), 0.25


def analytic(kind: str, scheduler: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """(3, 4000): one cloud of a network that knows the answer, in the units of the training."""
    pipeline = small(DPMSolver(prediction_type=kind))
    network = Known(kind, CENTRE, WIDTH)

    def predictor(labels: Any, timesteps: Tensor, scale: float) -> Any:
        return lambda latents, index, timestep: network(latents, timestep)

    monkeypatch.setattr(pipeline, "predictor", predictor)
    given = {"num_points": 4000, "generator": seeded(3)[0], "output_type": "latent"}
    return pipeline(1, scheduler=scheduler, num_inference_steps=steps, **given).clouds[0]


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [("default", 50), ("dpm++-official", 50), ("ddim", 200), ("euler", 200), ("unipc", 100), ("ddpm", 1000)],
)
def test_every_scheduler_draws_the_gaussian_the_network_knows(
    scheduler: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4000 points the mean is known to 0.004 and the deviation to 1.2 %, at one sigma; both kinds of
    answer draw the same cloud."""
    found = {}
    for kind in ("epsilon", "v_prediction"):
        found[kind] = analytic(kind, scheduler, steps, monkeypatch)
        torch.testing.assert_close(found[kind].mean(1).double(), CENTRE, rtol=0, atol=0.02)
        torch.testing.assert_close(found[kind].std(1), torch.full((3,), WIDTH), rtol=0.06, atol=0)
    torch.testing.assert_close(found["v_prediction"], found["epsilon"], rtol=0, atol=2e-3)


def test_solvers_agree_on_where_a_point_of_noise_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way without noise a Gaussian's point keeps its place among the others."""
    start = torch.randn(1, 3, 4000, generator=seeded(3)[0])[0]
    expected = CENTRE[:, None] + WIDTH * start
    for scheduler in ("dpm++", "ddim", "unipc"):
        found = analytic("v_prediction", scheduler, 200, monkeypatch)
        torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=0.03)


def test_airplanes_are_walked_by_every_scheduler() -> None:
    """Their betas rise and then stay; solvers of diffusers are handed them one by one."""
    pipeline = small(PointDiffusion(**AIRPLANE))
    betas = torch.cumprod(1 - pipeline.scheduler.config.betas(), 0).float()
    for name in ("dpm++", "dpm++-official", "ddim", "euler", "unipc"):
        walk = pipeline._walk(name)
        torch.testing.assert_close(walk.alphas_cumprod, betas, rtol=1e-5, atol=1e-6)
        pipeline.check(0, scheduler=name)
        assert np.isfinite(draw(pipeline, scheduler=name)).all()
    assert pipeline._walk("ddpm").config == pipeline.scheduler.config
    assert np.array_equal(draw(pipeline, scheduler="ddpm"), draw(pipeline))


def test_the_published_sampler_is_that_of_the_stored_schedule() -> None:
    walk = small(DPMSolver(beta_end=0.01, prediction_type="v_prediction"))._walk("ddpm")
    assert isinstance(walk, PointDiffusion)
    assert (walk.config.beta_end, walk.config.prediction_type) == (0.01, "v_prediction")
    with pytest.raises(ValueError, match=r"beta_schedule must be 'linear' or 'warm0\.1'"):
        small(DPMSolver(beta_schedule="scaled_linear")).check(0, scheduler="ddpm")


# Completion


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [("dpm++", 6), ("dpm++-official", 6), ("ddim", 6), ("euler", 6), ("unipc", 6), ("sa", 6), ("ddpm", 60)],
)
def test_known_points_are_kept_to_the_last_bit(kind: str, scheduler: str, steps: int) -> None:
    pipeline = small(DPMSolver(prediction_type=kind))
    known = known_points(20)
    given = {"known_points": known, "scheduler": scheduler, "num_inference_steps": steps}
    cloud = draw(pipeline, **given)[0]
    assert np.array_equal(cloud[:20], known)
    free = draw(pipeline, scheduler=scheduler, num_inference_steps=steps)[0]
    assert not np.allclose(cloud[20:], free[20:], atol=1e-4), "the others must see them"


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_on_the_way_known_points_have_the_noise_of_their_timestep(kind: str) -> None:
    pipeline = small(DPMSolver(prediction_type=kind))
    known = known_points(20)
    start = torch.randn(1, 3, POINTS, generator=seeded(1)[0])
    shown = list(
        pipeline.denoise(
            1,
            known_points=known,
            latents=start,
            num_points=POINTS,
            num_inference_steps=8,
        )
    )
    signal = pipeline.scheduler.config.signal(torch.float64)
    clean = pipeline.encode(known)[0]
    for step, after in itertools.pairwise(shown):
        share = signal[int(after.timestep)]
        # The walk starts from noise alone, where the timestep would have 0.6 % of the cloud.
        expected = share.sqrt() * clean + (1 - share).sqrt() * start[0, :, :20]
        torch.testing.assert_close(step.latents[0, :, :20].double(), expected.double(), rtol=0, atol=0.02)
        assert step.denoised is not None
        torch.testing.assert_close(step.denoised[0, :, :20], clean, rtol=0, atol=2e-3)
    assert torch.equal(shown[-1].latents[0, :, :20], clean)


def test_each_cloud_may_be_completed_from_its_own_points(pipeline: DiT3DPipeline) -> None:
    known = known_points(2, 10)
    clouds = draw(pipeline, [1, 1], generator=seeded(5, 6), known_points=known)
    assert np.array_equal(clouds[:, :10], known)
    alone = draw(pipeline, 1, generator=seeded(6)[0], known_points=known[1])
    np.testing.assert_allclose(clouds[1], alone[0], atol=1e-5)
    both = draw(pipeline, [1, 1], generator=seeded(5, 6), known_points=known[0].tolist())
    assert np.array_equal(both[0, :10], both[1, :10])


def test_when_all_points_are_known_they_are_what_comes_out(pipeline: DiT3DPipeline) -> None:
    known = known_points(POINTS)
    assert np.array_equal(draw(pipeline, 1, known_points=torch.from_numpy(known))[0], known)


# Interpolation


def test_the_ends_of_an_interpolation_are_the_clouds_of_its_seeds(pipeline: DiT3DPipeline) -> None:
    given = {"num_points": POINTS, "num_inference_steps": 4}
    clouds = pipeline.interpolate("chair", 11, 12, 2, **given).clouds
    for cloud, seed in zip(clouds, (11, 12), strict=True):
        np.testing.assert_allclose(cloud, draw(pipeline, generator=seeded(seed)[0])[0], atol=1e-5)


def test_on_the_way_noise_stays_as_strong_and_changes_evenly(pipeline: DiT3DPipeline) -> None:
    noise = pipeline.noise_between(1, 2, 5, POINTS)
    ends = pipeline.noise(2, POINTS, seeded(1, 2))
    assert torch.equal(noise[[0, -1]], ends)
    lengths = noise.flatten(1).norm(dim=1)
    assert ((lengths - lengths[0]).abs() <= (lengths[-1] - lengths[0]).abs() + 1e-3).all()
    apart = (noise[1:] - noise[:-1]).flatten(1).norm(dim=1)
    assert apart.max() / apart.min() < 1.1
    assert torch.equal(pipeline.noise_between(3, 3, 2, POINTS), pipeline.noise(2, POINTS, seeded(3, 3)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"class_labels": [0, 1]}, "stays within one class, and here are 2"),
        ({"count": 1}, "count must be an integer from 2"),
        ({"seed_a": 1.5}, "seed_a must be an integer"),
        ({"scheduler": "ddpm"}, "adds no noise on the way, unlike PointDiffusion; take 'dpm"),
        ({"scheduler": "sa"}, "unlike SASolverScheduler"),
        ({"scheduler": "quick"}, "scheduler must be one of default"),
        ({"scheduler": "ddim", "eta": 0.5}, "unlike DDIMScheduler with eta"),
        ({"generator": seeded(1)[0]}, "leave out generator"),
        ({"num_points": 1}, "num_points must be an integer from 2"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer"),
    ],
)
def test_interpolations_that_mean_nothing_are_refused(
    pipeline: DiT3DPipeline, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.interpolate(**{"class_labels": 0, "seed_a": 1, "seed_b": 2, "count": 3, **given})
    with pytest.raises(ValueError, match="unlike PointDiffusion"):
        small(PointDiffusion()).interpolate(0, 1, 2)


# Folders


def other_schedulers() -> list[Any]:
    from diffusers import DDIMScheduler

    noise = {"prediction_type": "v_prediction", "beta_end": 0.015}
    return [
        DPMSolver(**noise),
        PointDiffusion(**noise),
        PointDiffusion(**AIRPLANE),
        DDIMScheduler(**noise, clip_sample=False),
        DDIMScheduler(clip_sample=False),
    ]


@pytest.mark.parametrize("number", range(5))
def test_a_saved_folder_draws_the_same(number: int, tmp_path: Path) -> None:
    saved = small(other_schedulers()[number])
    saved.save_pretrained(tmp_path)
    loaded = DiT3DPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is type(saved.scheduler)
    assert (loaded.id2label, loaded.mean, loaded.std) == (LABELS, MEAN, STD)
    assert np.array_equal(draw(loaded, "mug", guidance_scale=2.0), draw(saved, 2, guidance_scale=2.0))


def test_half_precision_weights_draw_nearly_the_same(pipeline: DiT3DPipeline, tmp_path: Path) -> None:
    """bfloat16 keeps less than three digits of the weights; the points stay float32."""
    pipeline.save_pretrained(tmp_path)
    loaded = DiT3DPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.transformer.dtype == torch.bfloat16
    found, expected = draw(loaded), draw(pipeline)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_the_folder_may_ask_for_the_class_of_diffusers(pipeline: DiT3DPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    theirs = DiT3DPipeline.from_pretrained(tmp_path, own_parts=False)
    assert type(theirs.scheduler).__name__ == "DPMSolverMultistepScheduler"
    np.testing.assert_allclose(draw(theirs), draw(pipeline), atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"_class_name": "DiTPipeline"}, "holds a DiTPipeline, not a DiT3DPipeline"),
        ({"transformer": ["pipelines", "AutoencoderKL"]}, "a AutoencoderKL does not belong"),
        ({"scheduler": None}, "lists no scheduler"),
        ({"mean": [0, 0]}, "mean must be three numbers"),
        ({"mean": [0, 0, float("nan")]}, "mean must be three numbers"),
        ({"mean": "000"}, "mean must be three numbers"),
        ({"std": 0}, "std must be a number above 0"),
        ({"std": True}, "std must be a number above 0"),
        ({"id2label": {"3": "sofa"}}, "a class '3', the weights have 0 to 2"),
    ],
)
def test_folders_that_do_not_fit_are_refused(
    pipeline: DiT3DPipeline, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match=message):
        DiT3DPipeline.from_pretrained(tmp_path)


def test_a_folder_without_units_is_refused(pipeline: DiT3DPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    entries = json.loads(path.read_text())
    del entries["mean"], entries["std"]
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="lacks 'mean' and 'std', the units of the data"):
        DiT3DPipeline.from_pretrained(tmp_path)


# Refusals


def test_classes_are_found_by_name_and_number(pipeline: DiT3DPipeline) -> None:
    assert pipeline.get_label_ids(["Plane", "1", 2, "chair"]) == [0, 1, 2, 1]
    assert pipeline.find_labels("airp") == [(0, "airplane")] and pipeline.num_classes == 3
    for given, message in (
        ("chaair", "Did you mean chair"),
        ("sofa", "they also have numbers, from 0 to 2"),
        (3, "there is no class 3; they are numbered from 0 to 2"),
        ([], "a class or a list of classes"),
        (None, "a class or a list of classes"),
        (True, "not True"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.check(given)


ROW = [[0.0, 0.1, 0.2]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_points": 1}, "num_points must be an integer from 2"),
        ({"num_points": 2048.0}, "num_points must be an integer"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer from 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be an integer from 1 to 1000"),
        ({"num_inference_steps": 1, "scheduler": "ddpm"}, "num_inference_steps must be an integer from 2"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"eta": 2}, "eta must be a number from 0 to 1"),
        ({"scheduler": "quick"}, "scheduler must be one of default, .*, not 'quick'"),
        ({"generator": seeded(1, 2)}, "2 generators for 1 clouds"),
        ({"latents": torch.zeros(1, 64, 3)}, r"latents must be a tensor of \(1, 3, 2048\)"),
        ({"latents": torch.full((1, 3, 2048), torch.nan)}, "latents hold numbers that are not finite"),
        ({"output_type": "pil"}, "output_type must be one of np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "not noise"),
        ({"known_points": [0.0, 0.1, 0.2]}, r"known_points must be \(K, 3\)"),
        ({"known_points": np.zeros((3, 9))}, r"known_points must be \(K, 3\), .* not \(3, 9\)"),
        ({"known_points": np.zeros((0, 3))}, r"known_points must be \(K, 3\)"),
        ({"known_points": "a chair"}, "numbers, not a str"),
        ({"known_points": [[0.0, float("nan"), 0.0]]}, "known_points hold numbers that are not finite"),
        ({"known_points": ROW * 9, "num_points": 8}, "9 known points for clouds of 8; give fewer"),
        ({"known_points": [ROW, ROW]}, "of 2 clouds, and 1 are asked for"),
        ({"known_points": [[100.0, 0.0, 0.0]]}, "times the data's spread of 0.17"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_any_work(
    pipeline: DiT3DPipeline, given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "noise", None)
    with pytest.raises(ValueError, match=message):
        pipeline.check(0, **given)
    with pytest.raises(ValueError, match=message):
        pipeline(0, **given)


def test_guidance_needs_weights_that_know_no_class() -> None:
    with pytest.raises(ValueError, match="guidance_scale must be 1 or less"):
        small(class_dropout=False).check(0, guidance_scale=2.0)


def test_networks_of_other_points_are_refused() -> None:
    with pytest.raises(ValueError, match="has 6 channels; a cloud has 3"):
        small(in_channels=6)


def test_an_unknown_argument_is_an_error(pipeline: DiT3DPipeline) -> None:
    with pytest.raises(TypeError, match="sigmas"):
        pipeline(0, sigmas=[1.0])
