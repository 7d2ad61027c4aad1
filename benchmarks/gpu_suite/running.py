"""Iterations of the real trainer, measured; and what must hold of them: resuming to the bit, the LoRA's file."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer import loop
from trainer.adapters import lora
from trainer.config import parse_config
from trainer.runs.directory import RunDirectory
from trainer.runs.metrics import Clock
from trainer.utils.distributed import Processes
from trainer.utils.seeds import noise

from .setting import GIB, Setting, replaced

ITERATIONS = 2
"""The first one pays for what is made once; the last one is reported."""
Prepare = Callable[[dict], AbstractContextManager]
"""A block, for a run description, in which a trainer of it can be made."""


def new_trainer(
    setting: Setting, data: dict, prepare: Prepare, run: RunDirectory | None = None
) -> tuple[loop.Trainer, float]:
    """A trainer that is ready to iterate, and the seconds of making it."""
    config = parse_config(with_device(setting, data))
    started = time.perf_counter()
    with prepare(data):
        trainer = loop.Trainer(config, run, Processes(config.runtime.device))
    setting.wait()
    trainer._resume()
    return trainer, time.perf_counter() - started


def with_device(setting: Setting, data: dict) -> dict:
    """The description, for the device of the setting."""
    return data | {"runtime": data["runtime"] | {"device": "auto" if setting.on_gpu else "cpu", "samples_every": 0}}


def measured(setting: Setting, data: dict, prepare: Prepare) -> tuple[loop.Trainer, dict]:
    """The trainer after `ITERATIONS`, and figures of the last one; sizes in GiB."""
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)
    trainer, load = new_trainer(setting, data, prepare)
    loaded = gib(setting)
    with phases(setting) as peaks:
        for _ in range(ITERATIONS):
            peaks.clear()
            event = trainer.iterate()
    adapter = trainer.policy.parameters
    figures = event["objective"]
    return trainer, {
        "seconds": {"load": load, **event["seconds"]},
        "gib": {"load": loaded, **peaks} if setting.on_gpu else {},
        "ratio_deviation": figures["rollout_deviation"]["max"],
        "grad_norm": event["grad_norm"],
        "forwards_per_image": event["forwards_per_image"],
        "lora_tensors": len(lora.comfy_weights(adapter, 1.0, trainer.model.lora_key)),
    }


def gib(setting: Setting) -> float:
    """The most that was allocated on the GPU since the last look at it; 0 without one."""
    if not setting.on_gpu:
        return 0.0
    peak = torch.cuda.max_memory_allocated(setting.device) / GIB
    torch.cuda.reset_peak_memory_stats(setting.device)
    return peak


@contextmanager
def phases(setting: Setting) -> Iterator[dict[str, float]]:
    """In this block, the GPU memory at the peak of each phase of an iteration, by its name; phases wait for the GPU."""
    peaks: dict[str, float] = {}

    class Measuring(Clock):
        @contextmanager
        def __call__(self, phase: str) -> Iterator[None]:
            with super().__call__(phase):
                gib(setting)
                yield
                setting.wait()
                peaks[phase] = max(peaks.get(phase, 0.0), gib(setting))

    with replaced(loop, Clock=Measuring):
        yield peaks


# ------------------------------------------------------------------------------------------------------- what must hold


def state(trainer: loop.Trainer) -> dict[str, torch.Tensor]:
    """A copy of everything that training changes."""
    return {name: value.detach().cpu().clone() for name, value in trainer.policy.tensors().items()}


def resumed(setting: Setting, data: dict, prepare: Prepare, whole: dict[str, torch.Tensor]) -> dict:
    """Weights and optimizer after as many iterations one by one, with a checkpoint between them.

    Args:
        whole: `state` after `ITERATIONS` in one go.
    """
    folder = setting.folder / "run"
    for _ in range(ITERATIONS):
        run = RunDirectory(folder).open(parse_config(with_device(setting, data)), [])
        trainer, _ = new_trainer(setting, data, prepare, run)
        trainer.iterate()
        trainer._save()
        run.release()
        parts = state(trainer)
        del trainer
        setting.free()
    off = max((whole[name].double() - parts[name].double()).abs().max().item() for name in whole)
    return {"resume_exact": all(torch.equal(whole[name], parts[name]) for name in whole), "resume_off": off}


@dataclass(frozen=True)
class Seen:
    """Predictions with a LoRA and without it."""

    trained: Tensor
    base: Tensor


def probe(trainer: loop.Trainer) -> Tensor:
    """A prediction for the first prompt, from fixed latents."""
    device = trainer.processes.device
    conditions = trainer.prompting.rows(torch.tensor([0])).to(device).conditions
    latents = noise(trainer.model.latent_shape, 0, "probe")[None].to(device)
    with torch.no_grad():
        return trainer.model.predict(latents, torch.full((1,), 0.6, device=device), conditions).float().cpu()


def save_lora(trainer: loop.Trainer, file: Path) -> Seen:
    """Make the LoRA large, so that it is seen, and write its file."""
    generator = torch.Generator().manual_seed(1)
    for value in trainer.policy.parameters.values():
        drawn = torch.randn(value.shape, generator=generator).to(value.device)
        value.data.copy_(0.7 * drawn / max(1, value[0].numel()) ** 0.5)
    trained = probe(trainer)
    with trainer.policy.using("base"):
        base = probe(trainer)
    trainer.policy.save_lora(file, trainer.policy.result(), {})
    return Seen(trained, base)


def loaded(setting: Setting, data: dict, prepare: Prepare, file: Path, seen: Seen) -> dict:
    """How a prediction with the LoRA's file differs from one with the LoRA, of the spread of predictions.

    The file is loaded by ComfyUI's own code into a model of a graph, and by the trainer into a diffusers folder's.
    """
    if "graph" in data["model"]:
        graph = data["model"]["graph"] | {"loras": [{"file": str(file)}]}
        changed = data | {"model": data["model"] | {"graph": graph}}
    else:
        changed = data | {"lora": data["lora"] | {"start_from": str(file)}}
    trainer, _ = new_trainer(setting, changed, prepare)
    spread = seen.trained.std()
    return {
        "lora_off": ((probe(trainer) - seen.trained).abs().max() / spread).item(),
        "lora_does": ((seen.base - seen.trained).abs().max() / spread).item(),
    }


def exercise(setting: Setting, data: dict, prepare: Prepare | None = None, checks: bool = True) -> dict:
    """All of the above; at no time are two models there."""
    prepare = prepare or (lambda data: nullcontext())
    trainer, found = measured(setting, data, prepare)
    if not checks:
        return found
    file, whole = setting.folder / "lora.safetensors", state(trainer)
    seen = save_lora(trainer, file)
    del trainer
    setting.free()
    found |= resumed(setting, data, prepare, whole)
    return found | loaded(setting, data, prepare, file, seen)
