"""Runs descriptions in the processes of a launcher, each with the network whole and divided, one after the other.

`python -m torch.distributed.run --nproc-per-node=2 two_processes.py FOLDER` reads FOLDER/*.yaml and writes, for each
and for `whole` and `sharded`, the learned tensors and a record with the events and the bytes of every process. The run
of plain.yaml is done once more in two parts.
"""

import json
import sys
from pathlib import Path
from typing import ClassVar

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
torch.set_num_threads(1)

import diffusers  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from trainer.config import read_config  # noqa: E402
from trainer.loop import Trainer  # noqa: E402
from trainer.models.diffusers.sharding import local_bytes  # noqa: E402
from trainer.runs.directory import RunDirectory  # noqa: E402
from trainer.utils.distributed import Processes  # noqa: E402


class SharedEncoding(Trainer):
    """A trainer that takes what an earlier one of the same description encoded."""

    known: ClassVar[dict] = {}

    def _encode(self, *arguments: object) -> tuple:
        key = (self.config.model.path, self.config.prompts.model_dump_json(), self.config.rollout.guidance_scale)
        if key not in self.known:
            self.known[key] = super()._encode(*arguments)
        return self.known[key]


def run(file: Path, sharded: bool, processes: Processes) -> None:
    events: list[dict] = []
    config = read_config(file, [f"model.sharded={json.dumps(sharded)}", "runtime.iterations=2"])
    trainer = SharedEncoding(config, None, processes, events.append)
    bytes_before = processes.gather([local_bytes(trainer.model.module)])
    trainer.train()
    record = {
        "events": events,
        "bytes": processes.gather([local_bytes(trainer.model.module)]),
        "bytes_before": bytes_before,
        "bytes_whole": sum(p.numel() * p.element_size() for p in trainer.model.module.parameters()),
        "learning": [name for name, p in trainer.model.module.named_parameters() if p.requires_grad],
    }
    if processes.is_main:
        name = f"{file.stem}-{'sharded' if sharded else 'whole'}"
        save(trainer, file.with_name(f"{name}.safetensors"))
        file.with_name(f"{name}.json").write_text(json.dumps(record))


def run_in_two_parts(file: Path, processes: Processes) -> None:
    """Stop after the first iteration, and go on in another trainer."""
    config = read_config(file, ["model.sharded=true", "runtime.iterations=2"])
    folder = file.with_name(f"{file.stem}-parts")

    def stop(event: dict) -> None:
        if event.get("iteration") == 1 and "rewards" in event:
            (folder / "stop").touch()

    for state, listener in (("stopped", stop), ("finished", lambda event: None)):
        run = RunDirectory(folder).open(config, ["test"]) if processes.is_main else RunDirectory(folder)
        processes.wait()
        trainer = SharedEncoding(config, run, processes, listener)
        assert trainer.train()["state"] == state
        run.release()
        processes.wait()
    if processes.is_main:
        save(trainer, folder.with_suffix(".safetensors"))


def save(trainer: Trainer, file: Path) -> None:
    save_file({key: value.detach().clone() for key, value in trainer.policy.tensors().items()}, file)


if __name__ == "__main__":
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    together = Processes("cpu")
    for description in sorted(Path(sys.argv[1]).glob("*.yaml")):
        for divided in (False, True):
            run(description, divided, together)
    run_in_two_parts(Path(sys.argv[1]) / "plain.yaml", together)
    together.close()
