"""Preset `auto` for a model of a graph: what the rules of `trainer/estimate/automatic.py` need to know about it."""

from collections.abc import Callable

from comfy.model_sampling import CONST, V_PREDICTION

from ...trainer.check import load_rewards
from ...trainer.config import AUTO, ModelConfig, parse_config
from ...trainer.diffusion.process import FLOW, VP, VP_V, Process
from ...trainer.estimate.automatic import Choice, Facts, choose, choose_for, filled
from ...trainer.estimate.memory import graph_peak, name_of
from ...trainer.models.distilled import distilled_steps
from ...trainer.rewards import memory_together
from ...trainer.runs.capacity import memory_bytes
from .. import types


def resolved(
    data: dict, settings: types.Settings | None, objective: types.Objective | None, model: types.Model, processes: int
) -> tuple[dict, str]:
    """A description with the choices of preset auto, and what it chose and why; unchanged with any other preset.

    Args:
        data: the description with the defaults of all settings.
        objective: of a connected GRPO Objective, which the preset leaves as it is.

    Raises:
        BadInput: nothing fits.
    """
    if settings is None or settings.preset != AUTO:
        return data, ""
    given = {section: dict(values) for section, values in (settings.given or {}).items()}
    plain = {name: data[name] for name in ("model", "prompts", "rewards") if name in data} | given
    if objective is not None:
        plain["objective"] = dict(objective)
    if start := data.get("lora", {}).get("start_from"):
        plain["lora"] = {**plain.get("lora", {}), "start_from": start}
    plain["evaluation"] = data["evaluation"]
    choice = _choice(plain, data, model, processes)
    result = {**data, **filled(plain, choice)}
    result["model"] = _with_memory(data["model"], choice)
    return result, choice.text()


def _choice(plain: dict, data: dict, model: types.Model, processes: int) -> Choice:
    if model.spec is None:
        return choose_for(plain, processes)
    config = ModelConfig.model_validate(model.section)
    from ...trainer.utils.distributed import Processes  # accelerate, which ComfyUI's start does not need

    device = Processes("auto").device
    rewards = memory_together(load_rewards(parse_config({**data, "model": {}}))[1].values())
    facts = Facts(
        family=config.family,
        process=_process(model.spec),
        pixels=config.height * config.width,
        frames=config.frames,
        distilled=distilled_steps(config),
        embeds_guidance=bool(model.spec.config.unet_config.get("guidance_embed", False)),
        device=name_of(device),
        on_cpu=device.type == "cpu",
        memory=memory_bytes("auto", processes),
        needed=_needed(plain, rewards, device.type == "cpu"),
    )
    return choose(facts)


def _process(spec: types.ModelSpec) -> Process:
    if isinstance(spec.sampling, CONST):
        return FLOW
    return VP_V if isinstance(spec.sampling, V_PREDICTION) else VP


def _needed(plain: dict, rewards: int, on_cpu: bool) -> Callable[[dict[str, dict]], int]:
    def needed(sections: dict[str, dict]) -> int:
        choice = Choice(sections, [])
        model = _with_memory(plain["model"], choice)
        return graph_peak(parse_config(filled({**plain, "model": model}, choice)), rewards, on_cpu)

    return needed


def _with_memory(section: dict, choice: Choice) -> dict:
    """The model section with gradient checkpointing as chosen, unless the node has switched it on."""
    chosen = choice.sections.get("model", {})
    return {**section, **{name: value or section.get(name) for name, value in chosen.items()}}
