"""Every diffusers family on tiny random models: its pipeline's images, and training that resumes exactly."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import PROMPTS, assert_same_tensors, lora_of, results_of
from learning import assert_same_learning
from safetensors.torch import load_file
from tiny_families import CASES, Case, write_image

from trainer.config import ModelConfig, RunConfig, parse_config
from trainer.loop import Trainer
from trainer.models import model_class
from trainer.models.diffusers.latents import pack, unpack
from trainer.rollout import Plan, Prompting, sample
from trainer.runs.directory import RunDirectory
from trainer.runs.launch import kill_tree
from trainer.utils.console import quiet_libraries
from trainer.utils.distributed import Processes
from trainer.utils.errors import BadInput

CPU = torch.device("cpu")
STEPS = 4


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def case(name: str) -> Case:
    return CASES[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model of a case, built when it is first asked for."""
    return functools.cache(lambda name: CASES[name].build(tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def folder(name: str, folders: Callable[[str], Path]) -> Path:
    return folders(name)


@pytest.fixture(scope="module")
def alone(case: Case, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three iterations in one process."""
    path = tmp_path_factory.mktemp("alone")
    train(description(case, folder), path)
    return path


@pytest.fixture(scope="module")
def config(case: Case, folder: Path) -> ModelConfig:
    return ModelConfig(family=case.family, path=str(folder), **case.model)


TEXTS = ["a red circle", "two triangles"]


def make_images(case: Case, folder: Path, count: int) -> list[Path | None]:
    """An image beside the model for each of `count` prompts, where the family needs them."""
    if not case.takes_images:
        return [None] * count
    return [write_image(folder / f"image_{i}.png", seed=i) for i in range(count)]


def test_rollout_without_noise_is_the_pipelines_own(
    case: Case, folder: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = model_class(config)
    guidance, shift = case.rollout.get("guidance_scale", 1.0), case.rollout.get("shift", 3.0)
    shown = make_images(case, folder, len(TEXTS))
    conditions = family.encode(config, [*TEXTS, "blue"], CPU, [*shown, None])
    family.check_conditions(config, conditions)
    model = family.load(config, CPU)
    prompting = Prompting(conditions.rows(torch.tensor([0, 1])), conditions.rows(torch.tensor([2])))
    start = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(5))
    plan = Plan("ode", 0.0, model.sigmas(STEPS, shift), [False] * STEPS, True, guidance)
    mine = sample(model, plan, prompting, torch.arange(2), start, lambda step: start).final
    determine(config, monkeypatch)
    expected = generate(case, folder, config, shown, start, "latent").reshape(mine.shape)
    assert mine.std() > 0.1
    assert (mine - start).abs().max() > 0.1
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    images = model.decode(mine)
    assert images.shape == (2, *((config.frames,) if config.frames > 1 else ()), 3, config.height, config.width)
    assert images.std() > 1e-3
    decoded = generate(case, folder, config, shown, start, "pt").reshape(images.shape)
    torch.testing.assert_close(images, decoded, rtol=0, atol=1e-4)


def test_loading_and_encoding_print_nothing(
    case: Case, folder: Path, config: ModelConfig, capfd: pytest.CaptureFixture
) -> None:
    quiet_libraries()  # as a run does first
    family = model_class(config)
    family.encode(config, [*TEXTS, ""], CPU, [*make_images(case, folder, len(TEXTS)), None])
    family.load(config, CPU)
    assert "".join(capfd.readouterr()) == ""


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

    without = {"safety_checker": None} if case.family == "sd" else {}  # the folder names one and has none
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **without)
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
    for text, path, noise in zip(TEXTS, shown, start.split(1), strict=True):
        image = {} if path is None else {"image": Image.open(path)}
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
    shown = make_images(case, folder, 4)
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
    run = RunDirectory(path).open(config, ["train"])

    def listen(event: dict) -> None:
        if event.get("iteration") == stop_after and "rewards" in event:
            (path / "stop").touch()

    try:
        summary = Trainer(config, run, Processes("cpu"), listen).train()
    finally:
        run.release()
    assert summary["state"] == ("stopped" if stop_after else "finished")
    return results_of(path)


def test_training_changes_the_lora_keeps_ratios_and_resumes_exactly(
    case: Case, folder: Path, alone: Path, tmp_path: Path
) -> None:
    config, whole = description(case, folder), results_of(alone)
    assert len(whole) == 3
    assert all(event["objective"]["actions"] > 0 and event["grad_norm"] > 0 for event in whole)
    # Guidance multiplies rounding; still a fifth of the clip range.
    assert all(event["objective"]["rollout_deviation"]["max"] < 2e-5 for event in whole)
    learned = lora_of(alone)
    if case.model.get("frames", 1) > 1:
        check_videos(alone / "samples", case)
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
    assert event["objective"]["rollout_deviation"]["max"] < 1e-6


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


# ------------------------------------------------------------------------------------------------- several processes


def uneven(folder: Path, **settings: dict) -> RunConfig:
    """Nine images over two processes in pairs: other numbers of prompts, of images and of calls in each."""
    rollout = {"steps": 4, "shift": 1.0, "eta": 0.5, "prompts_per_iteration": 3, "group_size": 3, "batch_size": 2}
    return parse_config(
        {
            "model": {"path": str(folder), "height": 16, "width": 16, "gradient_checkpointing": True},
            "prompts": {"texts": PROMPTS[:3]},
            "rollout": rollout | settings.get("rollout", {}),
            "rewards": [{"name": "brightness"} | settings.get("reward", {})],
            "objective": {"train_steps": "all", "batch_size": 2} | settings.get("objective", {}),
            "lora": {"rank": 2, "alpha": 4},
            "optimizer": {"learning_rate": 1e-3},
            "evaluation": {"texts": ["a green circle", "two squares", "a triangle"], "images_per_prompt": 1},
            "runtime": {"iterations": 2, "seed": 3, "device": "cpu"},
        }
    )


IN_TWO = [name for name in CASES if name not in ("sd-v", "sd-zero-snr", "wan-image", "hunyuanvideo-image")]
UNEVEN = {
    "plain": {},
    "updates, KL, guard": {"objective": {"updates": 3, "kl_weight": 0.5, "ratio": "guard"}},
    "window, best of n": {"advantage": {"best_of_n": 2}, "rollout": {"window": {"size": 2}, "guidance_scale": 2.0}},
    "skipped groups": {"reward": {"threshold": 0.0021}, "rollout": {"shared_noise": False}},
}


def in_this_process(config: RunConfig) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Events and what was learned of two iterations."""
    events: list[dict] = []
    trainer = Trainer(config, None, Processes("cpu"), events.append)
    trainer.train()
    return events, {name: value.detach() for name, value in trainer.policy.tensors().items()}


@pytest.fixture(scope="module")
def together(folders: Callable[[str], Path], tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case and every uneven run in two processes, each with the network whole and divided."""
    base = tmp_path_factory.mktemp("together")
    runs = {name: description(CASES[name], folders(name)) for name in IN_TWO}
    for name, config in (runs | {name: uneven(tiny_sd3, **settings) for name, settings in UNEVEN.items()}).items():
        (base / f"{name}.yaml").write_text(config.to_yaml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).parents[1] / "two_processes.py"
    with (base / "output").open("w") as output:
        child = subprocess.Popen([*launcher, script, base], stdout=output, stderr=subprocess.STDOUT)
    try:
        assert child.wait(1800) == 0, (base / "output").read_text()
    finally:
        kill_tree(child.pid)
    return base


def assert_same_run(ours: list[dict], theirs: list[dict]) -> None:
    ours, theirs = ([event for event in events if "rewards" in event] for events in (ours, theirs))
    assert len(theirs) == 2
    for one, two in zip(ours[:2], theirs, strict=True):
        assert one["objective"]["actions"] == two["objective"]["actions"] > 0
        assert one["skipped_groups"] == two["skipped_groups"]
        assert one["forwards_per_image"] == pytest.approx(two["forwards_per_image"], rel=0.6)
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
        for name, value in one["rewards"].items():
            assert value == pytest.approx(two["rewards"][name], abs=1e-5)


def result(base: Path, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((base / f"{name}.json").read_text()), load_file(base / f"{name}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*IN_TWO, *UNEVEN], scope="module")
def test_two_processes_give_the_run_of_one_whole_and_divided(
    name: str, together: Path, request: pytest.FixtureRequest
) -> None:
    if name in CASES:
        alone = request.getfixturevalue("alone")
        events, learned = results_of(alone), load_file(alone / "checkpoints" / "000002.safetensors")
    else:
        events, learned = in_this_process(parse_config(yaml.safe_load((together / f"{name}.yaml").read_text())))
    for kind in ("whole", "sharded"):
        record, tensors = result(together, f"{name}-{kind}")
        assert_same_run(events, record["events"])
        assert_same_learning(learned, tensors)
        check_memory(record, tensors, divided=kind == "sharded")
    if name == "skipped groups":
        iterations = [event for event in events if "objective" in event]
        assert iterations[1]["skipped_groups"] == 2, "one process has nothing to train, and still makes the calls"


@pytest.mark.slow
def test_a_divided_run_stops_and_goes_on_exactly(together: Path) -> None:
    assert_same_tensors(load_file(together / "plain-parts.safetensors"), result(together, "plain-sharded")[1])


def check_memory(record: dict, tensors: dict[str, torch.Tensor], divided: bool) -> None:
    """Between calls a process keeps its half of the frozen base, and the LoRA, which alone learns."""
    lora = sum(value.nbytes for name, value in tensors.items() if name.startswith("lora/"))
    base = record["bytes_whole"] - lora
    assert len(record["learning"]) == len([name for name in tensors if name.startswith("lora/")])
    assert all(".lora_" in name for name in record["learning"])
    assert record["bytes"] == record["bytes_before"]
    if divided:
        assert sum(record["bytes"]) == base + 2 * lora
        assert max(record["bytes"]) < 0.55 * base + lora
    else:
        assert record["bytes"] == [base + lora] * 2


def test_sharding_takes_several_processes_and_a_plain_diffusers_folder(tiny_sd3: Path) -> None:
    config = uneven(tiny_sd3).model_dump()
    with pytest.raises(BadInput, match="model.sharded is true: it takes several processes"):
        Trainer(parse_config(config, ["model.sharded=true"]), None, Processes("cpu"))
    with pytest.raises(BadInput, match="sharded needs a diffusers folder and no quantization"):
        parse_config(config, ["model.sharded=true", "model.quantization=nf4"])
