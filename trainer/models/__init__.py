"""Model families. A new family is one file that registers itself in `FAMILIES`."""

from ..config import ModelConfig
from ..errors import BadInput
from .base import Conditions, DiffusionModel
from .sd3 import SD3Model

FAMILIES: dict[str, type[DiffusionModel]] = {"sd3": SD3Model}


def model_class(config: ModelConfig) -> type[DiffusionModel]:
    """The class of the configured family, after a check of its folder; nothing large is loaded.

    Raises:
        BadInput: unknown family, or a folder that does not hold such a model.
    """
    if config.family not in FAMILIES:
        raise BadInput(f"model.family is {config.family!r}: choose one of {', '.join(FAMILIES)}")
    FAMILIES[config.family].check(config)
    return FAMILIES[config.family]


__all__ = ["FAMILIES", "Conditions", "DiffusionModel", "model_class"]
