"""The LoRA merged into the base model's weights, for forward passes without gradient: fewer and larger operations."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from ..config import RunConfig
from ..utils.errors import BadInput
from .compute import cast_once
from .lora import ADAPTER

FIELD = "rollout.merge_lora"


def check_merge(config: RunConfig) -> None:
    """Raise BadInput if the description rules out merging, because it would not be exact enough."""
    model = config.model
    if not config.rollout.merge_lora or model.graph is not None:
        return
    if model.dtype != "float32" or model.quantization or model.sharded:
        kind = model.quantization or ("sharded" if model.sharded else model.dtype)
        raise BadInput(f"{FIELD} is true and the base model is {kind}: {_ADVICE}")


_ADVICE = "merging would round the LoRA away; set it to false, or model.dtype to float32"


def check_merged(module: nn.Module) -> None:
    """Raise BadInput if no layer of a loaded network can be merged."""
    if not any(_mergeable(layer) for layer in module.modules()):
        raise BadInput(f"{FIELD} is true and no layer with a LoRA has plain float32 weights: {_ADVICE}")


def sampling(config: RunConfig, module: nn.Module) -> AbstractContextManager:
    """Context in which the run samples, with weights that do not change: `merged` if the description asks for it."""
    return merged(module) if config.rollout.merge_lora else cast_once(module)


@contextmanager
@torch.no_grad()
def merged(module: nn.Module) -> Iterator[None]:
    """In this context, layers whose base weight is plain float32 have their LoRA added to it.

    The base weight is replaced and not changed, so nothing remains of rounding afterwards; the sum takes the memory of
    these layers a second time. Layers whose LoRA is disabled, or whose weights are of another dtype, where the LoRA
    would be lost in rounding, compute as before.
    """
    layers = [layer for layer in module.modules() if _mergeable(layer) and not layer.disable_adapters]
    weights = [layer.get_base_layer().weight for layer in layers]
    before = [weight.data for weight in weights]
    for layer, weight in zip(layers, weights, strict=True):
        weight.data = weight.data + layer.get_delta_weight(ADAPTER).to(weight.device)
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, weight, data in zip(layers, weights, before, strict=True):
            weight.data = data
            layer.enable_adapters(True)


def _mergeable(layer: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer):
        return False
    weight = layer.get_base_layer().weight
    return type(weight) is nn.Parameter and type(weight.data) is torch.Tensor and weight.dtype == torch.float32
