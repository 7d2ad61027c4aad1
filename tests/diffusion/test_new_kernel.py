"""A kernel that is registered at run time is a choice everywhere, and trains."""

import pytest
import torch

from tools import reference
from trainer.config import RolloutConfig, parse_config
from trainer.diffusion import kernels
from trainer.diffusion.kernels.base import frozen_image
from trainer.diffusion.process import FLOW
from trainer.loop import Trainer
from trainer.utils.distributed import Processes
from trainer.utils.errors import BadInput
from trainer.utils.fields import choices

RENOISE = kernels.Kernel(
    name="renoise",
    process=FLOW,
    coefficients=lambda sigma, sigma_next, eta: frozen_image(sigma, sigma_next, torch.zeros_like(sigma)),
    default_eta=0.5,
    largest_eta=0.5,
    mean="(1 - s') x0",
    std="s'",
    summary="all noise fresh at every step",
)


def events(description: dict, kernel: str, eta: float) -> list[dict]:
    """One iteration without an evaluation."""
    settings = [f"rollout.kernel={kernel}", f"rollout.eta={eta}", "runtime.iterations=1", "evaluation.texts=[]"]
    kept: list[dict] = []
    Trainer(parse_config(description, settings), None, Processes("cpu"), kept.append).train()
    return [event for event in kept if "objective" in event]


def test_one_registration_makes_a_kernel(monkeypatch: pytest.MonkeyPatch, tiny_description: dict) -> None:
    with pytest.raises(BadInput, match=r"rollout.kernel is 'renoise': choose one of 'dance', .*'ddim'"):
        events(tiny_description, "renoise", 0.5)
    monkeypatch.setitem(kernels.KERNELS, RENOISE.name, RENOISE)
    assert choices(RolloutConfig.model_fields["kernel"])[-1] == "renoise"
    assert "| `renoise` | all noise fresh at every step |" in reference.KERNEL_TABLES["README.md"]()
    with pytest.raises(BadInput, match=r"eta 0.6 is outside the range of kernel renoise: 0 to 0.5"):
        parse_config(tiny_description, ["rollout.kernel=renoise", "rollout.eta=0.6"])
    (new,), (known,) = events(tiny_description, "renoise", 0.5), events(tiny_description, "cps", 1.0)
    for name, value in known["rewards"].items():  # cps at eta 1 renoises fully too
        assert new["rewards"][name] == pytest.approx(value, rel=1e-5)
    assert new["grad_norm"] == pytest.approx(known["grad_norm"], rel=1e-3)
    assert new["grad_norm"] > 0
