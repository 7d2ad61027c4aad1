"""The run description: everything that decides what a run does, validated before anything is loaded."""

from ..objectives.advantage import AdvantageConfig
from ..utils.section import Section
from .faults import describe
from .model import GraphExpert, GraphLora, GraphModel, GraphSampling, ModelConfig
from .parse import (
    AUTO,
    PRESETS,
    parse_config,
    parse_sections,
    preset,
    preset_names,
    read_config,
    read_mapping,
    settings,
)
from .sections import (
    EvaluationConfig,
    LoraConfig,
    OptimizerConfig,
    PromptsConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    RuntimeConfig,
    WatchdogConfig,
    WindowConfig,
)

__all__ = [
    "AUTO",
    "PRESETS",
    "AdvantageConfig",
    "EvaluationConfig",
    "GraphExpert",
    "GraphLora",
    "GraphModel",
    "GraphSampling",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PromptsConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "RuntimeConfig",
    "Section",
    "WatchdogConfig",
    "WindowConfig",
    "describe",
    "parse_config",
    "parse_sections",
    "preset",
    "preset_names",
    "read_config",
    "read_mapping",
    "settings",
]
