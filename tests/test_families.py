"""Every diffusers family on tiny random models: its pipeline's images, and training that resumes exactly."""

from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, assert_same_tensors, lora_of, results_of
from tiny_families import CASES, Case

from trainer.config import ModelConfig, RunConfig, parse_config
from trainer.distributed import Processes
from trainer.loop import Trainer
from trainer.models import model_class
from trainer.models.diffusers_family import pack, unpack
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


def test_rollout_without_noise_is_the_pipelines_own(case: Case, folder: Path, config: ModelConfig) -> None:
    family = model_class(config)
    texts, guidance = ["a red circle", "two triangles"], case.rollout.get("guidance_scale", 1.0)
    conditions = family.encode(config, [*texts, "blue"], CPU)
    model = family.load(config, CPU)
    prompting = Prompting(conditions.rows(torch.tensor([0, 1])), conditions.rows(torch.tensor([2])))
    start = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(5))
    shift = case.rollout.get("shift", 3.0)
    plan = Plan(model.still_kernel, 0.0, model.sigmas(STEPS, shift), [False] * STEPS, True, guidance)
    mine = sample(model, plan, prompting, torch.arange(2), start, lambda step: start, batch=2).final
    expected = generate(case, folder, config, texts, guidance, start, "latent")
    expected = unpack(expected, model.latent_shape) if expected.ndim == 3 else expected
    assert mine.std() > 0.1
    assert (mine - start).abs().max() > 0.1
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-4)
    images = decode(model, mine, 2)
    assert images.std() > 1e-3
    shown = generate(case, folder, config, texts, guidance, start, "pt")
    torch.testing.assert_close(images, shown, rtol=0, atol=1e-4)


def generate(
    case: Case, folder: Path, config: ModelConfig, texts: list[str], guidance: float, start: torch.Tensor, output: str
) -> torch.Tensor:
    """What the family's own pipeline makes of the same prompts and noise."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if case.rollout.get("kernel") == "ddim":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    packed = case.family == "flux"
    result = pipeline(
        prompt=texts,
        latents=(pack(start) if packed else start).clone(),
        num_inference_steps=STEPS,
        height=config.height,
        width=config.width,
        output_type=output,
        **({case.guidance: guidance, "negative_prompt": ["blue"] * len(texts)} if guidance != 1 else {}),
    )
    return result[0]


def description(case: Case, folder: Path) -> RunConfig:
    return parse_config(
        {
            "model": {"family": case.family, "path": str(folder), **case.model},
            "prompts": {"texts": PROMPTS[:3]},
            "rollout": {"steps": 4, "group_size": 3, "prompts_per_iteration": 2, **case.rollout},
            "rewards": [{"name": "brightness"}],
            "objective": {"train_steps": "all"},
            "lora": {"rank": 2, "alpha": 4, "ema_decay": 0.5},
            "optimizer": {"learning_rate": 1e-3},
            "evaluation": {"texts": ["a green circle"], "images_per_prompt": 1},
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
    assert all(value.abs().max() > 0 for name, value in learned.items() if name.endswith("lora_B.weight"))
    assert len(train(config, tmp_path / "parts", stop_after=2)) == 2
    (tmp_path / "parts" / "stop").unlink(missing_ok=True)
    assert train(config, tmp_path / "parts") == whole
    assert_same_tensors(lora_of(tmp_path / "parts"), learned)


def test_ratios_are_one_before_the_update(case: Case, folder: Path, tmp_path: Path) -> None:
    config = parse_config(description(case, folder).model_dump(), ["rollout.guidance_scale=1", "runtime.iterations=1"])
    (event,) = train(config, tmp_path / "run")
    assert event["ratio"]["max_deviation_before_update"] < 1e-6


def test_packing_is_undone_by_unpacking() -> None:
    latents = torch.randn(2, 16, 4, 6)
    assert torch.equal(unpack(pack(latents), (16, 4, 6)), latents)
