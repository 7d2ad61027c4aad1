"""The preset `auto`: settings for a model and the device that is there, and why each was chosen."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..check import check_run
from ..config import parse_config, preset, preset_names
from ..diffusion.process import FLOW, Process
from ..models.distilled import distilled_steps
from ..runs.capacity import memory_bytes
from ..utils.errors import BadInput
from . import memory
from .forecast import size

SECTIONS = ("rollout", "advantage", "objective", "lora", "optimizer", "runtime")
"""Sections that the preset fills; of `evaluation` it sets nothing but how often, and of `model` what memory decides."""
USABLE = 0.9
"""Share of the device's memory that is planned with: its context, fragmentation and workspaces are not counted."""
LARGE, VIDEO = 0.6e6, (8, 2)
"""Pixels from which on an image is large; images per prompt and prompts of an iteration for videos."""
AMOUNTS = {"small": (12, 4), "large": (8, 4), "cpu": (6, 2)}
"""Images per prompt and prompts of an iteration."""
LADDER: tuple[tuple[bool, int, int, int], ...] = (
    (False, 4, 12, 32),
    (True, 4, 12, 32),
    (True, 2, 8, 32),
    (True, 1, 4, 32),
    (True, 1, 1, 32),
    (True, 1, 1, 16),
    (True, 1, 1, 8),
)
"""Gradient checkpointing, batch size of the update and of the rollout, and LoRA rank: what costs least time first."""
VIDEO_LADDER = ((False, 1, 1, 32), *LADDER[-3:])


@dataclass(frozen=True)
class Facts:
    """What the settings are chosen by.

    Attributes:
        family: name of the model's family.
        process: its diffusion process.
        pixels: of one image, or of one frame.
        frames: 1 for images.
        distilled: fewest and most steps that a step-distilled model is made for; None for others.
        embeds_guidance: whether the guidance scale is an input of the network.
        device: its name; `on_cpu` where that is the CPU.
        memory: bytes of the device.
        needed: bytes at the peak with these sections of a description; weights that can stay in RAM not counted.
    """

    family: str
    process: Process
    pixels: int
    frames: int
    distilled: tuple[int, int] | None
    embeds_guidance: bool
    device: str
    on_cpu: bool
    memory: int
    needed: Callable[[dict[str, dict]], int]


@dataclass(frozen=True)
class Choice:
    """Sections of a run description as plain data, and a sentence for each decision."""

    sections: dict[str, dict]
    reasons: list[str]

    def text(self) -> str:
        return "\n".join(["preset auto chose:", *(f"- {reason}" for reason in self.reasons)])


def choose(facts: Facts) -> Choice:
    """The same settings whenever the facts are the same.

    Raises:
        BadInput: the memory does not suffice for the smallest settings.
    """
    name, why = base_preset(facts)
    sections = {section: dict(values) for section, values in preset(name).items() if section in SECTIONS}
    reasons = [f"the settings of preset {name}, {why}"]
    for change in (_distilled, _guidance, _amount):
        reasons += change(facts, sections)
    sections, reason = _fitted(facts, sections)
    return Choice(sections, [*reasons, reason])


def base_preset(facts: Facts) -> tuple[str, str]:
    """The preset for one GPU to begin with, and why: the family's own, or that of the most similar family."""
    known = {preset(name)["model"]["family"]: name for name in preset_names() if name.startswith("one-gpu")}
    if facts.family in known:
        return known[facts.family], f"which is for family {facts.family}"
    if facts.process is not FLOW:
        return known["sd"], "because the model is a noise-prediction model (variance-preserving process)"
    if facts.frames > 1:
        return known["wan"], "because the model is a flow model that makes videos"
    return known["flux"], "because the model is a flow model that makes images"


def _distilled(facts: Facts, sections: dict[str, dict]) -> Iterator[str]:
    if facts.distilled is None:
        return
    steps = max(2, facts.distilled[1])
    rollout = sections["rollout"]
    rollout |= {"steps": steps, "guidance_scale": 1.0}
    rollout["window"] = {"size": min(rollout["window"]["size"], steps - 1), "position": "random"}
    yield f"{steps} steps without guidance: by its name the model is step-distilled for {facts.distilled[1]} at most"


def _guidance(facts: Facts, sections: dict[str, dict]) -> Iterator[str]:
    if facts.embeds_guidance and sections["rollout"]["guidance_scale"] != 1.0:
        sections["rollout"]["guidance_scale"] = 1.0
        yield "no classifier-free guidance: the guidance scale is an input of this network"


def _amount(facts: Facts, sections: dict[str, dict]) -> Iterator[str]:
    if facts.on_cpu:
        (group, prompts), why = AMOUNTS["cpu"], "a CPU is slow"
    elif facts.frames > 1:
        (group, prompts), why = VIDEO, "videos take long"
    else:
        large = facts.pixels > LARGE
        group, prompts = AMOUNTS["large" if large else "small"]
        why = "large images take long" if large else "published runs on one card use 12 to 24 images per prompt"
    sections["rollout"] |= {"group_size": group, "prompts_per_iteration": prompts}
    yield f"{group} images for each of {prompts} prompts in an iteration: {why}"


def _fitted(facts: Facts, sections: dict[str, dict]) -> tuple[dict[str, dict], str]:
    """The first of the ladder that the memory suffices for, and the sentence about it."""
    usable = int(USABLE * facts.memory)
    for checkpointing, batch, rollout_batch, rank in VIDEO_LADDER if facts.frames > 1 else LADDER:
        candidate = _with(sections, checkpointing, batch, rollout_batch, rank)
        needed = facts.needed(candidate)
        if needed <= usable:
            recomputed = "gradient checkpointing" if checkpointing else "no gradient checkpointing"
            return candidate, (
                f"{recomputed}, batches of {batch} in the update and {rollout_batch} in the rollout, rank {rank}: "
                f"{size(needed)} of the {size(usable)} usable on {facts.device} (computed)"
            )
    raise BadInput(
        f"preset auto finds no settings that fit: with gradient checkpointing, batches of 1 and rank {rank} "
        f"the run needs {size(needed)}, but only {size(usable)} are usable on {facts.device}: choose a smaller "
        "image size, fewer frames or smaller weights (fp8, nf4)"
    )


def _with(sections: dict[str, dict], checkpointing: bool, batch: int, rollout_batch: int, rank: int) -> dict[str, Any]:
    return sections | {
        "model": {"gradient_checkpointing": checkpointing},
        "objective": sections["objective"] | {"batch_size": batch},
        "rollout": sections["rollout"] | {"batch_size": rollout_batch},
        "lora": sections["lora"] | {"rank": rank, "alpha": 2 * rank},
    }


# --------------------------------------------------------------------------------------------------- a description


def filled(data: dict[str, Any], choice: Choice) -> dict[str, Any]:
    """A description with what the preset chose, where it says nothing itself.

    Args:
        data: plain data of a description, with no more settings than its author gave.
    """
    result = dict(data)
    for section, values in choice.sections.items():
        given = data.get(section) or {}
        if section == "objective" and given.get("name", "grpo") != "grpo":
            continue
        result[section] = {**values, **given}
    if (data.get("objective") or {}).get("name", "grpo") != "grpo" and "window" not in (data.get("rollout") or {}):
        result["rollout"] = {**result["rollout"], "window": None}  # all steps of the other objectives are deterministic
    return result


def choose_for(data: dict[str, Any], processes: int = 1) -> Choice:
    """The choice for the description of a diffusers folder or of the embedded model.

    Raises:
        BadInput: something in the description cannot be accepted, or nothing fits.
    """
    config = parse_config(data)
    if config.model.path == "embedded":
        return demo_choice()
    checked = check_run(config, processes)
    from ..utils.distributed import Processes  # accelerate, which ComfyUI's start does not need

    device = Processes(config.runtime.device).device
    on_cpu = device.type == "cpu"

    def needed(sections: dict[str, dict]) -> int:
        merged = parse_config(filled({**data, "model": {**data["model"], **sections["model"]}}, Choice(sections, [])))
        return memory.peak(memory.parts(merged, checked, processes, on_cpu), on_cpu)

    return choose(
        Facts(
            family=config.model.family,
            process=checked.family.process,
            pixels=config.model.height * config.model.width,
            frames=config.model.frames,
            distilled=distilled_steps(config.model),
            embeds_guidance=False,  # the family's own preset has its guidance
            device=memory.name_of(device),
            on_cpu=on_cpu,
            memory=memory_bytes(config.runtime.device, processes),
            needed=needed,
        )
    )


def demo_choice() -> Choice:
    """The settings that were measured on the embedded model."""
    sections = {section: dict(values) for section, values in preset("demo").items() if section in SECTIONS}
    return Choice(sections, ["the settings of preset demo, which were measured on the embedded model"])
