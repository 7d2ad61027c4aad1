"""GRPO Base Model: the model to train, from core's loaders or from a diffusers folder."""

from typing import get_args

import torch
from comfy.samplers import SCHEDULER_NAMES
from comfy_api.latest import io
from pydantic import ValidationError

from ..trainer.config import GraphExpert, ModelConfig
from ..trainer.config import describe as describe_errors
from ..trainer.models import FAMILIES, model_class
from ..trainer.models.comfy import describe
from ..trainer.utils.errors import BadInput
from .host import inputs, progress
from .host.folders import diffusers_folders
from .types import CATEGORY, Model, ModelSpec, ModelType

NO_FOLDER = "(none in models/diffusers)"
BY_SHIFT = "by shift"
FOR_FOLDERS = ("folder", "family", "dtype", "vae_dtype")
"""Widgets that a connected model does not use."""


def folder_inputs() -> list[io.Input]:
    """Widgets of size, and of a diffusers folder."""
    fields = ModelConfig.model_fields
    return [
        io.Combo.Input(
            "folder",
            options=list(diffusers_folders()) or [NO_FOLDER],
            tooltip="A diffusers folder (with a model_index.json) inside ComfyUI's models/diffusers. Ignored if a "
            "model is connected.",
        ),
        io.Combo.Input(
            "family",
            options=[family for family in FAMILIES if family != "comfy"],
            tooltip="The model family of the diffusers folder. Ignored if a model is connected.",
        ),
        io.Int.Input("width", default=512, min=8, max=8192, step=8, tooltip=fields["width"].description),
        io.Int.Input("height", default=512, min=8, max=8192, step=8, tooltip=fields["height"].description),
        io.Combo.Input(
            "dtype",
            options=["bfloat16", "float32"],
            tooltip=f"{fields['dtype'].description} Ignored if a model is connected, which keeps the dtype of its "
            "loader.",
        ),
        io.Combo.Input(
            "vae_dtype",
            options=["float32", "bfloat16", "float16", "auto"],
            advanced=True,
            tooltip=f"{fields['vae_dtype'].description} Ignored if a VAE is connected, which keeps its dtype.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=False,
            advanced=True,
            tooltip=fields["gradient_checkpointing"].description,
        ),
    ]


def model_inputs() -> list[io.Input]:
    """Sockets and widgets of a connected model."""
    fields = ModelConfig.model_fields
    return [
        io.Model.Input(
            "model",
            optional=True,
            tooltip="From core's Load Diffusion Model or Load Checkpoint, optionally through Load LoRA and "
            "ModelSampling nodes. It is trained with ComfyUI's own code.",
        ),
        io.Vae.Input("vae", optional=True, tooltip="The connected model's VAE, from core's loaders."),
        io.Sigmas.Input(
            "sigmas",
            optional=True,
            tooltip="Noise levels for a connected model, instead of scheduler. Their number must be steps + 1.",
        ),
        io.Combo.Input(
            "scheduler",
            options=[*SCHEDULER_NAMES, BY_SHIFT],
            default="simple",
            optional=True,
            tooltip="Scheduler of a connected model's noise levels, as in KSampler. 'by shift' uses the shift of the "
            "settings instead.",
        ),
        io.Int.Input("frames", default=1, min=1, max=4096, optional=True, tooltip=fields["frames"].description),
        io.Float.Input(
            "reserve_gb",
            default=0.0,
            min=0.0,
            max=1000.0,
            step=0.5,
            optional=True,
            advanced=True,
            tooltip="GPU memory in GB that a connected model's weights leave free for the LoRA and for activations; 0 "
            "for an estimate. Weights that do not fit stay in RAM. If the GPU runs out of memory, set it higher.",
        ),
        *expert_inputs(),
    ]


def expert_inputs() -> list[io.Input]:
    """The socket and widgets of the second network of a model with two, such as Wan 2.2."""
    fields = GraphExpert.model_fields
    return [
        io.Model.Input(
            "low_noise_model",
            optional=True,
            tooltip="For a model in two files, such as Wan 2.2: the one for low noise; model is then the one for high "
            "noise.",
        ),
        io.Float.Input(
            "boundary",
            default=fields["boundary"].default,
            min=0.01,
            max=0.99,
            step=0.005,
            optional=True,
            tooltip=f"{fields['boundary'].description} Used if low_noise_model is connected.",
        ),
        io.Combo.Input(
            "trained_network",
            options=list(get_args(fields["trained"].annotation)),
            default=fields["trained"].default,
            optional=True,
            tooltip=f"{fields['trained'].description} Used if low_noise_model is connected.",
        ),
    ]


class BaseModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_BaseModel",
            display_name="GRPO Base Model",
            category=CATEGORY,
            description="The model to train: a MODEL and VAE from core's loaders, or a diffusers folder in "
            "models/diffusers and its family. If a model is connected, folder, family, dtype and vae_dtype are "
            "ignored.",
            search_aliases=[
                "grpo model",
                "base model",
                "diffusers",
                "training model",
                "lora",
                "rlhf",
                "fine-tune",
                "finetune",
                "dancegrpo",
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=[*folder_inputs(), *model_inputs()],
            outputs=[ModelType.Output(display_name="grpo_model", tooltip="For GRPO Train LoRA.")],
        )

    @classmethod
    def execute(
        cls,
        folder: str,
        family: str,
        model: object | None = None,
        vae: object | None = None,
        sigmas: torch.Tensor | None = None,
        scheduler: str = "simple",
        reserve_gb: float = 0.0,
        low_noise_model: object | None = None,
        boundary: float = 0.875,
        trained_network: str = "both",
        **values: object,
    ) -> io.NodeOutput:
        if model is None and low_noise_model is not None:
            raise BadInput("low_noise_model is connected and model is not: connect the network for high noise to model")
        if model is None:
            return cls._of_folder(folder, {**values, "family": family})
        inputs.linked(model, "model", "MODEL")
        if vae is not None:
            inputs.linked(vae, "vae", "VAE")
        if sigmas is not None:
            inputs.noise_levels(sigmas, "sigmas")
        get_node = cls.hidden.dynprompt.get_node
        links = get_node(cls.hidden.unique_id)["inputs"]
        graph = describe.describe(
            model,
            vae,
            None if scheduler == BY_SHIFT else scheduler,
            sigmas,
            next(describe.nodes_above(get_node, links.get("vae")), None),
            describe.nodes_above(get_node, links.get("model")),
        )
        graph["reserve_gb"] = inputs.finite(reserve_gb, "reserve_gb") or None
        if low_noise_model is not None:
            inputs.linked(low_noise_model, "low_noise_model", "MODEL")
            above = describe.nodes_above(get_node, links.get("low_noise_model"))
            graph["low_noise"] = describe.describe_low_noise(
                low_noise_model, model, above, inputs.finite(boundary, "boundary"), trained_network
            )
        used = {name: value for name, value in values.items() if name not in FOR_FOLDERS}
        config = _checked({**used, "family": "comfy", "graph": graph})
        describe.check_size(model, config)
        progress.say(
            f"using the connected model ({graph['weights'] or 'quantized'}); ignored: {', '.join(FOR_FOLDERS)}",
            cls.hidden.unique_id,
        )
        return io.NodeOutput(Model(config.model_dump(mode="json"), ModelSpec.of(model)))

    @classmethod
    def _of_folder(cls, folder: str, values: dict) -> io.NodeOutput:
        known = diffusers_folders()
        if folder not in known:
            raise BadInput(
                f"folder {folder[:100]!r} is not in models/diffusers; choose one of: {', '.join(known) or '(none)'}"
            )
        return io.NodeOutput(Model(_checked({**values, "path": str(known[folder])}).model_dump(mode="json")))


def _checked(model: dict) -> ModelConfig:
    try:
        config = ModelConfig.model_validate(model)
    except ValidationError as error:
        raise BadInput(describe_errors(error)) from error
    model_class(config)
    return config


NODES = [BaseModel]
