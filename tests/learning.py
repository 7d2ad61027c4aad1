"""Two runs that should learn the same, compared by measures that hold on any CPU."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def newest_checkpoint(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's newest checkpoint, as `Policy.tensors` names them."""
    return load_file(max((run / "checkpoints").glob("*.safetensors")))


def assert_same_learning(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Compare what two runs learned: gradients tightly, weights by their distance.

    AdamW divides a gradient by its own size, so a gradient that is rounding error alone moves its weight by a whole
    step in either direction. Its first moment is a plain average of the gradients and has no such amplification.

    Args:
        ours, theirs: tensors as `Policy.tensors` names them, from a LoRA that started with `lora_B` at 0.
    """
    assert ours.keys() == theirs.keys()
    moment, other = (_flat(tensors, "optimizer/", "/exp_avg") for tensors in (ours, theirs))
    assert moment.norm() > 0
    assert (moment - other).norm() < 1e-3 * moment.norm()
    learned, other = (_flat(tensors, "lora/", ".lora_B.default.weight") for tensors in (ours, theirs))
    assert learned.abs().max() > 1e-3, "nothing was learned, so agreement means nothing"
    assert (learned - other).norm() < 0.05 * learned.norm()


def _flat(tensors: dict[str, torch.Tensor], start: str, end: str) -> torch.Tensor:
    chosen = [name for name in sorted(tensors) if name.startswith(start) and name.endswith(end)]
    return torch.cat([tensors[name].flatten() for name in chosen])
