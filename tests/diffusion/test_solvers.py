"""Solvers of the deterministic steps against closed forms and against diffusers."""

import math

import pytest
import torch
from torch import Tensor

from trainer.diffusion.process import FLOW, VP, VP_V, Process
from trainer.diffusion.schedules import sigma_schedule
from trainer.diffusion.solvers import SOLVERS, DPMSolver2M, Euler, Solver

EVERY = pytest.mark.parametrize("process", [FLOW, VP, VP_V], ids=repr)
MEAN, STD = 0.7, 0.4
"""Of the images, pixel by pixel normal: the best prediction is linear, and the ODE has a closed form."""


def spread(process: Process, sigma: float) -> float:
    """Standard deviation of the latents at a noise level."""
    return math.hypot(process.signal(sigma) * STD, sigma)


def best_prediction(process: Process, latents: Tensor, sigma: float) -> Tensor:
    """The posterior mean of the target."""
    standard = (latents - process.signal(sigma) * MEAN) / spread(process, sigma)
    image = MEAN + process.signal(sigma) * STD**2 / spread(process, sigma) * standard
    return process.target(image, sigma / spread(process, sigma) * standard, sigma)


def solve(solver: Solver, levels: list[float], latents: Tensor) -> Tensor:
    for sigma, sigma_next in zip(levels[:-1], levels[1:], strict=True):
        latents = solver.step(latents, best_prediction(solver.process, latents, sigma), sigma, sigma_next)
    return latents


def error(kind: type[Solver], process: Process, first: float, last: float, steps: int) -> float:
    """Largest error after even steps from one noise level to another."""
    noise = torch.linspace(-2, 2, 9)[None]
    start, end = (process.signal(sigma) * MEAN + spread(process, sigma) * noise for sigma in (first, last))
    levels = [first + (last - first) * i / steps for i in range(steps + 1)]
    return (solve(kind(process), levels, start) - end).abs().max().item()


@EVERY
def test_2m_converges_with_order_two_and_euler_with_order_one(process: Process) -> None:
    for kind, order in ((Euler, 1), (DPMSolver2M, 2)):
        errors = [error(kind, process, 0.9, 0.3, steps) for steps in (10, 20, 40)]
        found = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
        assert found == pytest.approx([order, order], abs=0.1)


@EVERY
def test_2m_is_nearer_from_noise_to_image_too(process: Process) -> None:
    first = 1.0 if process is FLOW else 0.99
    for steps in (10, 20, 40):
        assert error(DPMSolver2M, process, first, 0.0, steps) < error(Euler, process, first, 0.0, steps) / 4


@EVERY
def test_2m_equals_diffusers(process: Process) -> None:
    from diffusers import DPMSolverMultistepScheduler

    levels = sigma_schedule(8, 3.0) if process is FLOW else [0.998, 0.98, 0.93, 0.8, 0.6, 0.35, 0.1, 0.04, 0.0]
    kinds = {
        FLOW: {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        VP: {"prediction_type": "epsilon"},
        VP_V: {"prediction_type": "v_prediction"},
    }
    scheduler = DPMSolverMultistepScheduler(final_sigmas_type="zero", **kinds[process])
    scheduler.set_timesteps(8)
    scheduler.sigmas = torch.tensor([sigma * process.k_scale(sigma) for sigma in levels])
    theirs = mine = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    solver = DPMSolver2M(process)
    for sigma, sigma_next, t in zip(levels[:-1], levels[1:], scheduler.timesteps, strict=True):
        theirs = scheduler.step(torch.tanh(3 * theirs), t, theirs).prev_sample
        mine = solver.step(mine, torch.tanh(3 * mine), sigma, sigma_next)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert mine.std() > 0.1


@EVERY
def test_the_first_step_and_the_one_to_zero_are_eulers(process: Process) -> None:
    latents, prediction = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    solver, euler = DPMSolver2M(process), Euler(process)
    assert torch.equal(solver.step(latents, prediction, 0.9, 0.7), euler.step(latents, prediction, 0.9, 0.7))
    second = solver.step(latents, 2 * prediction, 0.7, 0.5)
    assert not torch.allclose(second, euler.step(latents, 2 * prediction, 0.7, 0.5))
    assert torch.equal(solver.step(latents, prediction, 0.5, 0.0), euler.step(latents, prediction, 0.5, 0.0))


def test_after_a_reset_the_next_step_is_a_first_one() -> None:
    latents, prediction = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    solver = DPMSolver2M(FLOW)
    solver.step(latents, prediction, 0.9, 0.7)
    solver.reset()
    again = solver.step(latents, 2 * prediction, 0.7, 0.5)
    assert torch.equal(again, Euler(FLOW).step(latents, 2 * prediction, 0.7, 0.5))


def test_solvers_are_registered_under_their_names() -> None:
    assert list(SOLVERS) == ["euler", "2m"] == [solver.name for solver in SOLVERS.values()]
