"""Every diffusers family on tiny random models: its pipeline's images, and training that resumes exactly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPTS, assert_same_tensors, lora_of, results_of, run_program
from tiny_families import CASES, Case, write_picture

from trainer.config import ModelConfig, RunConfig, parse_config
from trainer.distributed import Processes
from trainer.loop import Trainer
from trainer.models import model_class
from trainer.models.latents import pack, unpack
from trainer.rollout import Plan, Prompting, decode, sample
from trainer.run import RunDirectory

CPU = torch.device("cpu")
STEPS = 4


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.build(tmp_path_factory.mktemp(case.family))


@pytest.fixture(scope="module")
def config(case: Case, folder: Path) -> ModelConfig:
    return ModelConfig(family=case.family, path=str(folder), **case.model)


TEXTS = ["a red circle", "two triangles"]


def pictures(case: Case, folder: Path, count: int) -> list[Path | None]:
    """A picture beside the model for each of `count` prompts, where the family needs them."""
    if not case.pictures:
        return [None] * count
    return [write_picture(folder / f"picture_{i}.png", seed=i) for i in range(count)]


def test_rollout_without_noise_is_the_pipelines_own(
    case: Case, folder: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = model_class(config)
    guidance, shift = case.rollout.get("guidance_scale", 1.0), case.rollout.get("shift", 3.0)
    shown = pictures(case, folder, len(TEXTS))
    conditions = family.encode(config, [*TEXTS, "blue"], CPU, [*shown, None])
    family.check_conditions(config, conditions)
    model = family.load(config, CPU)
    prompting = Prompting(conditions.rows(torch.tensor([0, 1])), conditions.rows(torch.tensor([2])))
    start = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(5))
    plan = Plan(model.still_kernel, 0.0, model.sigmas(STEPS, shift), [False] * STEPS, True, guidance)
    mine = sample(model, plan, prompting, torch.arange(2), start, lambda step: start, batch=2).final
    determine(config, monkeypatch)
    expected = generate(case, folder, config, shown, start, "latent").reshape(mine.shape)
    assert mine.std() > 0.1
    assert (mine - start).abs().max() > 0.1
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-4)
    images = decode(model, mine, 2)
    assert images.shape == (2, *((config.frames,) if config.frames > 1 else ()), 3, config.height, config.width)
    assert images.std() > 1e-3
    decoded = generate(case, folder, config, shown, start, "pt").reshape(images.shape)
    torch.testing.assert_close(images, decoded, rtol=0, atol=1e-4)


def determine(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conditions in the pipelines are as large as the result, and the middle of the VAE's distribution."""
    from diffusers.models.autoencoders import vae
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

    monkeypatch.setattr(vae.DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    size = config.width, config.height, None
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: size)


def generate(
    case: Case, folder: Path, config: ModelConfig, shown: list[Path | None], start: torch.Tensor, output: str
) -> torch.Tensor:
    """What the family's own pipeline makes of the same prompts and noise."""
    from diffusers import DiffusionPipeline
    from PIL import Image

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler_of(case, pipeline)
    packed = case.family.startswith(("flux", "qwen"))
    settings = {"num_inference_steps": STEPS, "height": config.height, "width": config.width, "output_type": output}
    if "frames" in case.model:
        settings["num_frames"] = config.frames
    scale = case.rollout.get("guidance_scale", 1.0)
    if scale != 1 or case.guidance == "guidance_scale":
        settings |= {"negative_prompt": "blue"} if scale != 1 else {}
        settings |= {case.guidance: scale} if case.family != "hunyuanvideo" else {}
    results = []
    for text, picture, noise in zip(TEXTS, shown, start.split(1), strict=True):
        image = {} if picture is None else {"image": Image.open(picture)}
        latents = (pack(noise) if packed else noise).clone()
        result = pipeline(prompt=text, latents=latents, **settings, **image)[0]
        results.append(unpack(result, start.shape[1:]) if packed and output == "latent" else result)
    return torch.cat(results)


def scheduler_of(case: Case, pipeline: Any) -> Any:
    """DDIM for UNets, else Euler over evenly spaced levels with the case's shift, or with the folder's own."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    config = pipeline.scheduler.config
    if case.rollout.get("kernel") == "ddim":
        return DDIMScheduler.from_config(config, clip_sample=False)
    shift = case.rollout.get("shift", 3.0) or config.get("flow_shift")
    if shift is None:
        return pipeline.scheduler
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    even = [1 - i / STEPS for i in range(STEPS)]
    plain = scheduler.set_timesteps
    scheduler.set_timesteps = lambda count=None, device=None, sigmas=None, mu=None: plain(sigmas=even, device=device)
    return scheduler


def description(case: Case, folder: Path) -> RunConfig:
    held_out = "a green circle"
    shown = pictures(case, folder, 4)
    for name, texts, files in (("train", PROMPTS[:3], shown[:3]), ("held_out", [held_out], shown[3:])):
        lines = [{"prompt": t} | ({"image": f.name} if f else {}) for t, f in zip(texts, files, strict=True)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return parse_config(
        {
            "model": {"family": case.family, "path": str(folder), **case.model},
            "prompts": {"file": str(folder / "train.jsonl")},
            "rollout": {"steps": 4, "group_size": 3, "prompts_per_iteration": 2, **case.rollout},
            "rewards": [{"name": "brightness"}],
            "objective": {"train_steps": "all"},
            "lora": {"rank": 2, "alpha": 4, "ema_decay": 0.5},
            "optimizer": {"learning_rate": 1e-3},
            "evaluation": {"file": str(folder / "held_out.jsonl"), "images_per_prompt": 1},
            "runtime": {"iterations": 3, "seed": 3, "device": "cpu", "samples_every": 2},
        }
    )


def train(config: RunConfig, path: Path, stop_after: int = 0) -> list[dict]:
    """Run in this process; returns the events."""
    run = RunDirectory.open(path, config, ["train"])

    def listen(event: dict) -> None:
        if event.get("iteration") == stop_after and "rewards" in event:
            (path / "stop").touch()

    try:
        summary = Trainer(config, run, Processes("cpu"), listen).train()
    finally:
        run.release()
    assert summary["state"] == ("stopped" if stop_after else "finished")
    return results_of(path)


def test_training_changes_the_lora_keeps_ratios_and_resumes_exactly(case: Case, folder: Path, tmp_path: Path) -> None:
    config = description(case, folder)
    whole = train(config, tmp_path / "whole")
    assert len(whole) == 3
    assert all(event["actions"] > 0 and event["grad_norm"] > 0 for event in whole)
    # Guidance multiplies rounding; still a fifth of the clip range.
    assert all(event["ratio"]["max_deviation_before_update"] < 2e-5 for event in whole)
    learned = lora_of(tmp_path / "whole")
    if case.model.get("frames", 1) > 1:
        check_videos(tmp_path / "whole" / "samples", case)
    idle = {name.split(".lora_")[0] for name, value in learned.items() if "lora_B" in name and not value.any()}
    # The last block's text is not read any more.
    last = {f"diffusion_model.transformer_blocks.1.attn.{name}" for name in ("add_q_proj", "to_add_out")}
    assert idle == (last if case.family.startswith("qwen") else set())
    assert len(train(config, tmp_path / "parts", stop_after=2)) == 2
    (tmp_path / "parts" / "stop").unlink(missing_ok=True)
    assert train(config, tmp_path / "parts") == whole
    assert_same_tensors(lora_of(tmp_path / "parts"), learned)


def check_videos(samples: Path, case: Case) -> None:
    import av

    files = sorted(path.name for path in samples.glob("*.mp4"))
    assert files == ["evaluation_000000.mp4", "evaluation_000003.mp4", "rollout_000000.mp4", "rollout_000002.mp4"]
    with av.open(samples / "rollout_000000.mp4") as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert float(stream.average_rate) == 16
    assert len(frames) == case.model["frames"]
    assert all(frame.std() > 1 for frame in frames)


def test_ratios_are_one_before_the_update(case: Case, folder: Path, tmp_path: Path) -> None:
    config = parse_config(description(case, folder).model_dump(), ["rollout.guidance_scale=1", "runtime.iterations=1"])
    (event,) = train(config, tmp_path / "run")
    assert event["ratio"]["max_deviation_before_update"] < 1e-6


def test_packing_is_undone_by_unpacking() -> None:
    latents = torch.randn(2, 16, 4, 6)
    assert torch.equal(unpack(pack(latents), (16, 4, 6)), latents)


@pytest.mark.parametrize("name", ["wan", "sd", "qwen-image"])
def test_network_comes_from_a_single_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = CASES[name].build(tmp_path / "model")
    settings = {"family": CASES[name].family, "path": str(folder), **CASES[name].model}
    family = model_class(ModelConfig(**settings))
    expected = family.load(ModelConfig(**settings), CPU).module.state_dict()
    file = (folder / family.component / "diffusion_pytorch_model.safetensors").rename(tmp_path / "one.safetensors")
    config = ModelConfig(**settings, network_file=str(file))
    assert model_class(config) is family
    assert_same_tensors(family.load(config, CPU).module.state_dict(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan-i2v"])
def test_two_processes_give_the_run_of_one(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = case.build(tmp_path / "model")
    config = description(case, folder)
    alone = train(config, tmp_path / "one")
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml())
    done = run_program("train", file, "--output", tmp_path / "two", "--processes", 2, check=False)
    assert done.returncode == 0, done.stderr
    shared = results_of(tmp_path / "two")
    for ours, theirs in zip(alone, shared, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    first, second = lora_of(tmp_path / "one"), lora_of(tmp_path / "two")
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=0, atol=1e-5)
