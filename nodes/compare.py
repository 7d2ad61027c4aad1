"""Compare LoRAs: scores images of the connected model with and without LoRAs, from the same prompts and noise."""

import hashlib
from pathlib import Path

import comfy.samplers
import folder_paths
from comfy_api.latest import io, ui
from torch import Tensor

from ..trainer.config import GraphExpert
from ..trainer.evaluation.comparison import compared, summary, text_table
from ..trainer.evaluation.paper_table import paper_table
from ..trainer.evaluation.sheet import contact_sheet
from ..trainer.models.comfy import describe
from ..trainer.prompts.forms import check_lines
from ..trainer.prompts.text import check_prompts, prompt_lines
from ..trainer.rewards.files import read_weights
from ..trainer.utils.errors import BadInput
from . import types
from .host import compared_loras, comparing, inputs, progress, results
from .host.images import image_output
from .types import CATEGORY, RewardType, RunType, connected

NONE = "(none)"
NAMES = tuple(f"lora_{number}" for number in range(1, 5))
MODELS = tuple(f"lora_model_{number}" for number in range(1, 3))
BASE = "base"
LOW = compared_loras.LOW_SOCKET


class CompareLoRAs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_CompareLoRAs",
            display_name="Compare LoRAs (DanceGRPO)",
            category=CATEGORY,
            description="Compares LoRAs with the base model on the same prompts and noise: mean reward with confidence "
            "interval, win rate, diversity, and a contact sheet.",
            search_aliases=[
                "evaluate", "evaluate lora", "lora comparison", "compare models", "win rate", "benchmark", "ab test",
                "contact sheet", "xy plot", "lora", "reward model", "preference", "dancegrpo",
            ],
            is_output_node=True,
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[*_sockets(), *_widgets(), *_loras(), *_run_and_low_noise()],
            outputs=[
                io.Image.Output(display_name="contact_sheet", tooltip="Per prompt the first image of every model."),
                io.String.Output(display_name="table", tooltip="Means, intervals and win rates as text."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, prompts: list[str | None] = (None,)) -> bool | str:
        try:
            if None not in prompts:  # None comes through a link and is not known yet
                _texts({"prompts": prompts})
        except BadInput as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **given: list) -> str:
        """A fingerprint of the LoRA files, which may be overwritten under the same name."""
        names = [each for name in _chosen(given) for each in compared_loras.partners(name)]
        files = [folder_paths.get_full_path("loras", name) for name in names]
        stats = [file and (Path(file).stat().st_mtime_ns, Path(file).stat().st_size) for file in files]
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    @classmethod
    def check_lazy_status(cls, **given: list) -> list[str]:
        """Check all other inputs before models are loaded."""
        with progress.errors_on_node(cls.hidden.unique_id):
            _texts(given)
            _check_boundary(given)
            _files(given)
            if waiting := _waiting(given, ("reward", "run")):
                return waiting
            connected(inputs.single(given["reward"], "reward"), types.Rewards, "reward")
            if run := _run(given):
                compared_loras.check_run(run, LOW in given)
            return _waiting(given, (*MODELS, "model", LOW, "clip", "vae", "latent_image", "conditioning", "sigmas"))

    @classmethod
    def execute(cls, **given: list) -> io.NodeOutput:
        with progress.errors_on_node(cls.hidden.unique_id):
            texts, reward = _texts(given), inputs.single(given["reward"], "reward")
            connected(reward, types.Rewards, "reward")
            loras = _loras_of(given)
            sampling = comparing.Sampling(
                **{name: inputs.single(given[name], name) for name in comparing.SAMPLING},
                negative=inputs.text(_optional(given, "negative", ""), "negative"),
            )
            parts = comparing.Parts(*_parts(given))
            models = comparing.score_models(parts, sampling, texts, reward, loras, cls.hidden.unique_id)
        record = compared(models)
        record["paper"] = paper_table(record, reward.rewards)
        text, sheet = text_table(record), image_output(contact_sheet(models))
        progress.say(summary(record), cls.hidden.unique_id)
        data = {**record, "seed": sampling.seed, "prompt_texts": texts}
        shown = ui.PreviewImage(sheet, cls=cls).as_dict() | {"text": (text,), results.DATA: (results.jsonable(data),)}
        return io.NodeOutput(sheet, text, ui=shown)


# -------------------------------------------------------------------------------------------------------------- schema


def _sockets() -> list[io.Input]:
    return [
        io.Model.Input("model", lazy=True, tooltip="The base model."),
        io.Clip.Input("clip", lazy=True, tooltip="Encodes the prompts."),
        io.Vae.Input("vae", lazy=True, tooltip="Decodes the images."),
        io.Latent.Input(
            "latent_image", lazy=True, tooltip="An empty latent with the size of the images; its batch size is ignored."
        ),
        RewardType.Input(
            "reward", lazy=True, tooltip="Rewards that score the images; use Combine Rewards for several."
        ),
        io.Conditioning.Input(
            "conditioning",
            optional=True,
            lazy=True,
            tooltip="What all prompts share besides the text, such as guidance, reference latents or a first frame. "
            "Its text is ignored.",
        ),
        io.Sigmas.Input(
            "sigmas", optional=True, lazy=True, tooltip="Noise levels, in place of those of steps and scheduler."
        ),
    ]


def _widgets() -> list[io.Input]:
    text = {"multiline": True, "dynamic_prompts": False}
    return [
        io.String.Input(
            "prompts", tooltip="One prompt per line, not trained on. More prompts give narrower intervals.", **text
        ),
        io.String.Input(
            "negative", default="", optional=True, tooltip="Negative prompt, used if cfg is not 1.", **text
        ),
        io.Int.Input(
            "images_per_prompt", default=4, min=1, max=64, tooltip="With two or more, diversity is measured."
        ),
        io.Int.Input(
            "seed", default=1234, min=0, max=2**63 - 1, control_after_generate=False,
            tooltip="Seed of the noise, which is the same for every model and, with the embedded model, that of the "
            "trainer's own evaluations.",
        ),
        io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps."),
        io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance; 1 is off."),
        io.Combo.Input("sampler_name", options=comfy.samplers.SAMPLER_NAMES, tooltip="As in KSampler."),
        io.Combo.Input("scheduler", options=comfy.samplers.SCHEDULER_NAMES, tooltip="As in KSampler."),
        io.Float.Input(
            "strength", default=1.0, min=-100.0, max=100.0, step=0.01, tooltip="Strength of all LoRAs; 1 is as trained."
        ),
    ]  # fmt: skip


def _loras() -> list[io.Input]:
    options = [NONE, *folder_paths.get_filename_list("loras")]
    names = [
        io.Combo.Input(name, options=options, default=NONE, optional=True, tooltip="A LoRA of ComfyUI's list.")
        for name in NAMES
    ]
    sockets = [
        io.LoraModel.Input(
            name, optional=True, lazy=True, tooltip="A LoRA from the graph, such as that of GRPO Train LoRA."
        )
        for name in MODELS
    ]
    return [*names, *sockets]


def _run_and_low_noise() -> list[io.Input]:
    """A run in place of a LoRA's name, and the second network of models in two files."""
    boundary = GraphExpert.model_fields["boundary"]
    return [
        RunType.Input(
            "run", optional=True, lazy=True, tooltip="A run, from GRPO Train LoRA or GRPO Run: its newest LoRA."
        ),
        io.Model.Input(
            LOW,
            optional=True,
            lazy=True,
            tooltip="For a model in two files, such as Wan 2.2: the one for low noise; model is then the one for high "
            "noise, and a LoRA is a pair of files, of which one is chosen.",
        ),
        io.Float.Input(
            "boundary",
            default=boundary.default,
            min=0.01,
            max=0.99,
            step=0.005,
            optional=True,
            tooltip=f"{boundary.description} Used if low_noise_model is connected.",
        ),
    ]


# -------------------------------------------------------------------------------------------------------------- inputs


def _optional(given: dict[str, list], name: str, default: object = None) -> object:
    return inputs.single(given[name], name) if name in given else default


def _waiting(given: dict[str, list], names: tuple[str, ...]) -> list[str]:
    """Which of these sockets are connected to something that has not been computed yet."""
    return [name for name in names if name in given and list(given[name]) == [None]]


def _texts(given: dict[str, list]) -> list[str]:
    whole = "\n".join(inputs.text(text, "prompts") for text in given["prompts"])
    check_lines(whole, "prompts")
    texts = prompt_lines(whole)
    if not texts:
        raise BadInput(inputs.NO_PROMPTS)
    check_prompts(texts, "prompts")
    return texts


def _chosen(given: dict[str, list]) -> list[str]:
    """The names of the LoRAs that are chosen, each once."""
    names = [_optional(given, name, NONE) for name in NAMES]
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and name != NONE))


def _files(given: dict[str, list]) -> dict[str, compared_loras.Files]:
    """Their files.

    Raises:
        BadInput: one is not in ComfyUI's list, or what is connected does not belong together.
    """
    if LOW in given and (connected_here := [name for name in MODELS if name in given]):
        raise BadInput(
            f"{connected_here[0]} and {LOW} are connected, but a LoRA from a socket does not say for which of two "
            "networks it is: disconnect it, and choose its files in lora_1, or connect the run"
        )
    return compared_loras.files_of(_chosen(given), LOW in given)


def _check_boundary(given: dict[str, list]) -> None:
    inputs.finite(_optional(given, "boundary", comparing.BOUNDARY), "boundary")


def _run(given: dict[str, list]) -> str | None:
    run = _optional(given, "run")
    return None if run is None else inputs.text(run, "run")


def _loras_of(given: dict[str, list]) -> dict[str, compared_loras.Lora]:
    """The LoRAs by the name they are shown with: without folder and ending where that is not ambiguous."""
    loras = {
        name: {network: read_weights(file) for network, file in files.items()} for name, files in _files(given).items()
    }
    for name in MODELS:
        if (lora := _optional(given, name)) is not None:
            loras[name] = {"model": inputs.lora_tensors(lora, name)}
    if run := _run(given):
        loras[f"run {run}"] = compared_loras.of_run(run, LOW in given)
    return loras


def _parts(given: dict[str, list]) -> list:
    """The fields of `comparing.Parts`."""
    sockets = (("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE"))
    found = [inputs.linked(inputs.single(given[name], name), name, kind) for name, kind in sockets]
    latent, conditioning = inputs.single(given["latent_image"], "latent_image"), _optional(given, "conditioning")
    if not isinstance(latent, dict) or not isinstance(latent.get("samples"), Tensor):
        raise BadInput("latent_image must be connected to an output of type LATENT")
    carried = None if conditioning is None else inputs.conditioning(conditioning, "conditioning")
    levels = _optional(given, "sigmas")
    levels = None if levels is None else inputs.noise_levels(levels, "sigmas")
    low = _optional(given, LOW)
    if low is not None:
        describe.check_same_kind(inputs.linked(low, LOW, "MODEL"), found[0])
    return [*found, latent, carried, levels, low, _optional(given, "boundary", comparing.BOUNDARY)]


NODES = [CompareLoRAs]
