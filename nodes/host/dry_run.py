"""Checks a connected model and its conditioning on the meta device, before ComfyUI's models are unloaded."""

import copy
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn

from ...trainer.adapters import lora
from ...trainer.config import RunConfig
from ...trainer.models import EntryConditions, check_kernel
from ...trainer.models.comfy.conditions import Entry
from ...trainer.models.comfy.model import ComfyModel
from ...trainer.objectives import make_objective
from ...trainer.utils.errors import BadInput
from ..types import ModelSpec

META = torch.device("meta")


class MetaModel(ComfyModel):
    """The trainer's model on the meta device: it computes shapes only."""

    def _make_resident(self) -> None:
        """Nothing is in memory, so there is nothing to move."""

    def take(self, entry: Entry) -> None:
        """Run the network on the conditioning of a prompt.

        Raises:
            BadInput: the model needs an input that the conditioning does not have.
        """
        latents = torch.zeros(1, *self.latent_shape)
        try:
            (condition,) = self._conditions_of(latents, entry, "positive")
        except (AttributeError, KeyError, TypeError) as error:
            raise _lacking(error) from error
        given = {name: part.process_cond(batch_size=1, area=None) for name, part in condition["model_conds"].items()}
        levels = torch.full((1,), 0.5, device=META)
        options = {"cond_or_uncond": [0], "uuids": [condition["uuid"]], "sigmas": levels}
        options["optimized_attention_override"] = _attention  # other implementations query free memory
        given = self.comfy.samplers.cond_cat([given])
        try:
            self.base.apply_model(latents.to(META), levels, **given, transformer_options=options)
        except TypeError as error:
            if "required positional argument" in str(error):
                raise _lacking(error) from error
            raise


def _lacking(error: Exception) -> BadInput:
    return BadInput(f"clip and conditioning lack an input of the model ({error}): {WANTED}")


def _attention(_: Any, *arguments: Any, **keywords: Any) -> Tensor:
    return attention_pytorch(*arguments, **keywords)


WANTED = "connect the CLIP that belongs to the model and, if it needs more than text, conditioning"


def refuse(spec: ModelSpec, config: RunConfig, conditions: EntryConditions | None) -> None:
    """
    Args:
        conditions: text embeddings of the run's prompts; None if they were encoded earlier.

    Raises:
        BadInput: the trainer would refuse the model, the LoRA targets or the conditioning.
    """
    training = comfy.model_management.in_training
    try:
        meta_model = _meta_model(spec, config)
        if meta_model is None:
            return
        check_kernel(meta_model, config.model.family, config.rollout)
        make_objective(config).plan(meta_model, 0)
        if conditions is not None:
            _refuse_conditions(meta_model, conditions)
        with META:
            for name in lora.inject(meta_model.module, config.lora, meta_model.default_targets, seed=0):
                meta_model.lora_key(name)
    finally:
        comfy.model_management.in_training = training


def _meta_model(spec: ModelSpec, config: RunConfig) -> MetaModel | None:
    """The model without weights; None if it cannot be built from its configuration alone."""
    description = object.__new__(type(spec.config))  # its own attribute look-up is in the way of copy.copy
    vars(description).update(vars(spec.config), unet_config=dict(spec.config.unet_config), quant_config=None)
    with _with_shapes():
        base = description.get_model({}, "", device=META)
    if type(base) is not spec.kind:
        return None
    base.model_sampling = spec.sampling
    return MetaModel(comfy.model_patcher.ModelPatcher(base, META, META), None, config.model)


@contextmanager
def _with_shapes() -> Iterator[None]:
    """Turn off ComfyUI's dynamic memory, because with it layers have no weights until a file is loaded."""
    settings = sys.modules.get("comfy.memory_management", SimpleNamespace())  # older ones have none
    dynamic = getattr(settings, "aimdo_enabled", False)
    settings.aimdo_enabled = False
    try:
        yield
    finally:
        settings.aimdo_enabled = dynamic


def _refuse_conditions(meta_model: MetaModel, conditions: EntryConditions) -> None:
    wrong: list[str] = []

    def look(name: str, width: int) -> Any:
        def hook(layer: nn.Module, arguments: tuple) -> None:
            if arguments and isinstance(arguments[0], Tensor) and arguments[0].shape[-1] != width:
                wrong.append(f"layer {name} expects width {width} and gets {arguments[0].shape[-1]}")

        return hook

    for name, layer in meta_model.module.named_modules():
        width = getattr(layer, "in_features", None) or (getattr(layer, "normalized_shape", None) or (None,))[-1]
        if isinstance(layer, nn.Linear | nn.LayerNorm | nn.RMSNorm) and width is not None:
            layer.register_forward_pre_hook(look(name, width))
    sampling = meta_model.base.model_sampling
    meta_model.base.model_sampling = copy.deepcopy(sampling).to(META)
    try:
        meta_model.take(conditions.entries[0])
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001 - some networks need values, which the trainer will have
        logging.debug("the dry run of the model ended early: %s", error)
    finally:
        meta_model.base.model_sampling = sampling
    if wrong:
        raise BadInput(f"clip or conditioning does not match the model ({wrong[0]}): {WANTED}")
