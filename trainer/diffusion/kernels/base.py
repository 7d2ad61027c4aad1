"""What a transition kernel is, and the Gaussian step that all of them share."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..process import Level, Process, column

LARGEST_ETA = 10.0
"""No kernel takes more, whatever its scale."""


@dataclass(frozen=True)
class Coefficients:
    """The Gaussian of one step: mean = on_sample * sample + on_prediction * prediction; all float64 `[B]`."""

    on_sample: Tensor
    on_prediction: Tensor
    std: Tensor


@dataclass(frozen=True)
class Kernel:
    """A transition kernel: how the next latents are distributed, given the latents and the model's prediction.

    Attributes:
        name: its name in a run description and in the sampler node.
        process: of the models that it fits.
        coefficients: of `sigma, sigma_next, eta`, each float64 `[B]`, 1 >= sigma > sigma_next >= 0.
        default_eta: the eta its source uses.
        largest_eta: eta lies in 0 (deterministic) to this, ends included; 0 for a kernel that takes no noise.
        mean, std: its formulas, for people. s is sigma, s' the next one, x the latents, v the velocity, x0 and x1 the
            image and noise estimates, and for VP a and a' stand for alpha_bar at both levels.
        summary: what it is, in a line.
        source: where it is published.
        also: coefficients for models of further processes.
    """

    name: str
    process: Process
    coefficients: Callable[[Tensor, Tensor, Tensor], Coefficients]
    default_eta: float
    largest_eta: float
    mean: str
    std: str
    summary: str
    source: str = ""
    also: Mapping[Process, Callable[[Tensor, Tensor, Tensor], Coefficients]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.default_eta <= self.largest_eta <= LARGEST_ETA:
            raise ValueError(f"kernel {self.name}: 0 <= default_eta <= largest_eta <= {LARGEST_ETA:g} must hold")

    @property
    def deterministic(self) -> bool:
        """Whether it takes no noise at all."""
        return self.largest_eta == 0

    def fits(self, process: Process) -> bool:
        """Whether models of this process can be sampled by it."""
        return process is self.process or process in self.also

    def check_eta(self, eta: float) -> None:
        """Raise ValueError for an eta outside the kernel's range; a deterministic kernel ignores eta."""
        if not self.deterministic and not 0 <= eta <= self.largest_eta:
            raise ValueError(f"eta {eta:g} is outside the range of kernel {self.name}: 0 to {self.largest_eta:g}")


@dataclass(frozen=True)
class Step:
    """One transition.

    Attributes:
        next_sample: `[B, ...]` float32.
        mean: mean of the Gaussian it was drawn from, `[B, ...]` float32.
        std: its standard deviation, `[B]` float32; 0 for a deterministic step.
        log_prob: mean over all non-batch dimensions of the log-density of `next_sample`, `[B]` float32; 0 for a
            deterministic step, which has no density.
    """

    next_sample: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor


def log_prob(next_sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density, averaged over all non-batch dimensions (the average is what gives clip ranges their scale).

    Args:
        next_sample, mean: `[B, ...]` float32.
        std: `[B]` float32, 0 for deterministic steps.

    Returns:
        `[B]` float32; exactly 0 where std is 0.
    """
    safe = torch.where(std > 0, std, torch.ones_like(std))
    squared = ((next_sample - mean) / column(safe, mean)).square().reshape(len(mean), -1).mean(1)
    density = -0.5 * squared - safe.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(std > 0, density, torch.zeros_like(density))


def transition(
    kernel: Kernel,
    sample: Tensor,
    prediction: Tensor,
    sigma: Level,
    sigma_next: Level,
    eta: Level,
    noise: Tensor | None,
    next_sample: Tensor | None,
    process: Process | None,
) -> Step:
    """`kernels.step` of a kernel that has been looked up."""
    if noise is not None and next_sample is not None:
        raise ValueError("give exactly one of noise (to take a step) and next_sample (to score one), not both")
    if noise is None and next_sample is None and not kernel.deterministic and not _is_zero(eta):
        raise ValueError("give exactly one of noise (to take a step) and next_sample (to score one)")
    levels = [per_row(value, sample) for value in (sigma, sigma_next, eta)]
    if process is not None and not kernel.fits(process):
        raise ValueError(f"kernel {kernel.name} does not fit models of process {process.name}")
    coefficients = kernel.also.get(process, kernel.coefficients)(*levels)
    sample, prediction = sample.float(), prediction.float()
    mean = column(coefficients.on_sample, sample) * sample + column(coefficients.on_prediction, sample) * prediction
    std = coefficients.std.float()
    if next_sample is not None:
        next_sample = next_sample.float()
    elif noise is not None:
        next_sample = mean + column(std, sample) * noise.float()
    else:
        next_sample = mean
    return Step(next_sample, mean, std, log_prob(next_sample, mean, std))


def per_row(value: Level, sample: Tensor) -> Tensor:
    """A level for each row of the batch, `[B]` float64."""
    if isinstance(value, Tensor):
        return value.to(sample.device, torch.float64).expand(sample.shape[0])
    return torch.full((sample.shape[0],), value, dtype=torch.float64, device=sample.device)


def _is_zero(eta: Level) -> bool:
    return bool((eta == 0).all()) if isinstance(eta, Tensor) else eta == 0


def frozen_image(sigma: Tensor, sigma_next: Tensor, keep: Tensor) -> Coefficients:
    """The flow step x' = (1 - sigma') x0 + sigma' (keep x1 + sqrt(1 - keep^2) z), z standard normal.

    It is exact where the image estimate x0 is held fixed and the noise x1 follows an Ornstein-Uhlenbeck process.
    """
    image, noise = 1 - sigma_next, sigma_next * keep
    std = sigma_next * (1 - keep**2).clamp(min=0).sqrt()
    return Coefficients(image + noise, noise * (1 - sigma) - image * sigma, std)
