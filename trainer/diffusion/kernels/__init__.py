"""Transition kernels: one denoising step as a sample from a Gaussian, with its log-probability.

Sampling and training call the same function: given `noise` a step is taken, given `next_sample` the stored step is
scored again. All arithmetic is float32 (coefficients float64), because clip ranges of 1e-4 mean nothing below that.

A new kernel is a `Kernel` in a file of its own and its name in the tuple of `KERNELS`. Choices, ranges, tooltips and
the tables of the documentation come from there.
"""

from torch import Tensor

from ..process import Level, Process
from .base import LARGEST_ETA, Coefficients, Kernel, Step, log_prob, transition
from .cps import CPS
from .dance import DANCE, DANCE_EXACT
from .ddim import DDIM
from .flow import FLOW_EXACT, FLOW_SDE
from .ode import ODE

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (DANCE, DANCE_EXACT, FLOW_SDE, FLOW_EXACT, CPS, DDIM, ODE)
}


def step(
    kernel: str | Kernel,
    sample: Tensor,
    prediction: Tensor,
    sigma: Level,
    sigma_next: Level,
    eta: Level,
    *,
    noise: Tensor | None = None,
    next_sample: Tensor | None = None,
    process: Process | None = None,
) -> Step:
    """One step from noise level sigma to sigma_next.

    Args:
        kernel: one of `KERNELS`, by name or itself.
        sample: latents `[B, ...]` of any rank.
        prediction: of a model of `process`, shaped as `sample`.
        sigma, sigma_next: noise levels, 1 >= sigma > sigma_next >= 0; floats or `[B]`.
        eta: strength of the kernel's noise, >= 0, in its own scale (in `dance` a diffusion coefficient, not the [0, 1]
            eta of ancestral samplers); float or `[B]`.
        noise: standard normal, shaped as `sample`, to take the step.
        next_sample: a stored outcome, to score it.
        process: the model's; None for the kernel's own.

    Raises:
        ValueError: unknown kernel, or one for other processes, or not exactly one of `noise` and `next_sample`
            (neither is needed for a deterministic kernel, or with eta 0).
    """
    kernel = named(kernel) if isinstance(kernel, str) else kernel
    return transition(kernel, sample, prediction, sigma, sigma_next, eta, noise, next_sample, process)


def named(name: str) -> Kernel:
    """The kernel of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in KERNELS:
        raise ValueError(f"kernel {name!r} is unknown; choose one of {', '.join(KERNELS)}")
    return KERNELS[name]


def stochastic(process: Process | None = None) -> list[str]:
    """Names of the kernels that add noise, of one process or of all: what a run can be trained with."""
    return [k.name for k in KERNELS.values() if not k.deterministic and (process is None or k.fits(process))]


__all__ = ["KERNELS", "LARGEST_ETA", "Coefficients", "Kernel", "Step", "log_prob", "named", "step", "stochastic"]
