"""Makes ComfyUI's networks trainable: in-place operations run out of place, and blocks are checkpointed."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .conditions import mapped

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

    Args:
        keeps: functions that are not replaced.
    """

    def __init__(self, keeps: frozenset[Callable] = frozenset()) -> None:
        super().__init__()
        self.keeps = keeps

    def __torch_function__(
        self, function: Callable, types: Any, arguments: tuple = (), keywords: dict | None = None
    ) -> Any:
        if any(isinstance(value, Tensor) and value.requires_grad for value in arguments):
            if function in _NORMS:
                arguments = (arguments[0].clone(), *arguments[1:])
            if function not in self.keeps:
                function = _PLAIN.get(function, function)
        return function(*arguments, **(keywords or {}))


def kept_in_place(network: nn.Module) -> frozenset[Callable]:
    """Functions that a network calls as in `x.add_(y)`, whose results it does not assign: LTX-2's blocks do.

    Apart from norms, nothing there needs the old value in the backward pass; if something did, PyTorch would say so.
    """
    return frozenset({Tensor.add_}) if type(network).__name__ == "LTXAVModel" else frozenset()


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
        block.forward = _checkpointed(block.forward, kept_in_place(network))
    return len(wrapped)


def _checkpointed(forward: Callable, keeps: frozenset[Callable]) -> Callable:
    from torch.utils.checkpoint import checkpoint

    @wraps(forward)
    def run(*arguments: Any, **keywords: Any) -> Any:
        if keeps:  # the block changes its inputs, which are needed again when it is recomputed
            arguments = tuple(mapped(list(arguments), Tensor.clone))
        with OutOfPlace(keeps):  # also needed when the block is recomputed
            return forward(*arguments, **keywords)

    @wraps(forward)
    def outer(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        return checkpoint(run, *arguments, use_reentrant=False, **keywords)

    return outer


_ROTARY = ("apply_rope_split_half", "apply_rope_split_half1", "rms_rope", "rms_rope1")
_ROTARY += ("rms_rope_split_half", "rms_rope_split_half1")
"""Fused kernels that some networks (Ernie-Image, JoyImage) call in training as well."""


def differentiate_kernels() -> None:
    """Give ComfyUI's fused rotary kernels a backward pass: that of the plain formula, which is computed again.

    Their forward pass stays what it is in sampling. Kernels that have a backward pass, or do not exist in the installed
    version, are left alone.
    """
    try:
        from comfy_kitchen.backends.eager import rope
    except ImportError:
        return
    from torch._library.custom_ops import OPDEFS

    for name in _ROTARY:
        kernel, formula = OPDEFS.get(f"comfy_kitchen::{name}"), getattr(rope, name, None)
        if kernel is not None and formula is not None and kernel._backward_fn is None:
            kernel.register_autograd(_backward_of(formula), setup_context=_keep_inputs)


def _keep_inputs(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.tensors_at = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]


def _backward_of(formula: Callable) -> Callable:
    """The backward pass of a kernel that computes what `formula` does of the same arguments."""

    def backward(context: Any, *gradients: Tensor) -> tuple:
        inputs, needed = list(context.others), context.needs_input_grad  # without arguments left at their default
        for i, value in zip(context.tensors_at, context.saved_tensors, strict=True):
            inputs[i] = value.detach().requires_grad_(needed[i])
        with torch.enable_grad():
            outputs = formula(*inputs)
        wanted = [value for value, is_needed in zip(inputs, needed, strict=False) if is_needed]
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = iter(torch.autograd.grad(outputs, wanted, gradients))
        return tuple(next(found) if is_needed else None for is_needed in needed)

    return backward
