"""Makes ComfyUI's networks trainable: in-place operations run out of place, and blocks are checkpointed."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PLAIN = {
    Tensor.add_: Tensor.add,
    Tensor.sub_: Tensor.sub,
    Tensor.mul_: Tensor.mul,
    Tensor.div_: Tensor.div,
}
_NORMS = (torch.rms_norm, torch.nn.functional.rms_norm)


class OutOfPlace(TorchFunctionMode):
    """In this context `x += y` creates a new tensor, so that tensors saved for the backward pass do not change.

    `x += y` assigns the result to x, so its meaning does not change. A bare call `x.add_(y)` would have no effect, so
    `trainer.preflight` compares a training forward pass with plain inference. Norms get a copy of their input, because
    LTX-Video changes it afterwards with `addcmul_`, which cannot be replaced.
    """

    def __torch_function__(
        self, function: Callable, types: Any, arguments: tuple = (), keywords: dict | None = None
    ) -> Any:
        if any(isinstance(value, Tensor) and value.requires_grad for value in arguments):
            if function in _NORMS:
                arguments = (arguments[0].clone(), *arguments[1:])
            function = _PLAIN.get(function, function)
        return function(*arguments, **(keywords or {}))


def blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost blocks of a network: elements of its module lists, and a UNet's residual blocks."""
    found: list[nn.Module] = []

    def look(module: nn.Module, inside_list: bool) -> None:
        is_container = isinstance(module, nn.ModuleList | nn.Sequential)
        if (inside_list and not is_container and len(list(module.children())) > 1) or _is_residual(module):
            found.append(module)
            return
        for child in module.children():
            look(child, isinstance(module, nn.ModuleList))

    look(network, False)
    return found


def _is_residual(module: nn.Module) -> bool:
    return type(module).__name__ == "ResBlock"


def checkpoint_blocks(network: nn.Module) -> int:
    """Enable gradient checkpointing for each block; returns the number of blocks."""
    wrapped = blocks(network)
    for block in wrapped:
        block.forward = _checkpointed(block.forward)
    return len(wrapped)


def _checkpointed(forward: Callable) -> Callable:
    from torch.utils.checkpoint import checkpoint

    @wraps(forward)
    def run(*arguments: Any, **keywords: Any) -> Any:
        with OutOfPlace():  # also needed when the block is recomputed
            return forward(*arguments, **keywords)

    @wraps(forward)
    def outer(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        return checkpoint(run, *arguments, use_reentrant=False, **keywords)

    return outer
