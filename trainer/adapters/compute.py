"""How a LoRA computes beside a base model of half precision: in the base's dtype, from float32 master weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


def compute_in_base_dtype(module: nn.Module) -> None:
    """Let every LoRA layer of a network compute in the dtype of its input where that has half precision.

    peft casts the input to the LoRA's float32, and the sum back: half of all operations of a network in bfloat16, each
    over all tokens. Here only the two small matrices are cast. Their gradients go through that cast to the float32
    weights. Other dtypes compute as in peft, to the bit.
    """
    for layer in _layers(module):
        layer.__class__ = _subclass(type(layer))


@contextmanager
def cast_once(module: nn.Module) -> Iterator[None]:
    """In this context, in which the LoRA's weights must not change, each is cast once and not in every forward pass.

    Forward passes with gradient cast as ever, and so do compiled ones, where the casts of a block are one kernel.
    """
    layers = list(_layers(module))
    for layer in layers:
        layer.casts = {}
    try:
        yield
    finally:
        for layer in layers:
            layer.casts = None


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    from peft.tuners.lora import LoraLayer

    return (layer for layer in module.modules() if isinstance(layer, LoraLayer) and layer.lora_A)


@cache
def _subclass(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of peft's layers with another forward pass; it remains one of peft's for all who ask."""

    def forward(self: nn.Module, x: Tensor, *args: Any, **options: Any) -> Tensor:
        if x.dtype not in HALF or self.disable_adapters or self.merged:
            return kind.forward(self, x, *args, **options)
        result = self.base_layer(x, *args, **options)
        for name in self.active_adapters:
            down, up = self.lora_A[name], self.lora_B[name]
            result = _added(result, x, down, up, _cast(self, down, up, x.dtype), self.scaling[name])
        return result

    # `casts`: in `cast_once`, the two matrices by dtype.
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "casts": None})


def _cast(layer: nn.Module, down: nn.Module, up: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both matrices of a layer's LoRA in another dtype."""
    kept = None if torch.compiler.is_compiling() else layer.casts
    if kept is None or torch.is_grad_enabled():
        return down.weight.to(dtype), up.weight.to(dtype)
    if dtype not in kept:
        kept[dtype] = (down.weight.to(dtype), up.weight.to(dtype))
    return kept[dtype]


def _added(
    result: Tensor, x: Tensor, down: nn.Module, up: nn.Module, weights: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    """result + scale up(down(x)); in linear layers the sum is rounded once.

    Args:
        result: the base layer's output, in the dtype of `x`.
        down, up: the LoRA's layers, which have no bias.
        weights: theirs, in the dtype of `x`.
    """
    a, b = weights
    if not isinstance(down, nn.Linear):
        return result + up._conv_forward(down._conv_forward(x, a, None) * scale, b, None)
    hidden = nn.functional.linear(x, a).reshape(-1, len(a))
    return torch.addmm(result.reshape(-1, len(b)), hidden, b.t(), alpha=scale).view(result.shape)
