"""The two processes: what is noised, what the network is to predict, and what a prediction says of image and noise."""

import math

import pytest
import torch
from torch import Tensor

from trainer.diffusion import kernels
from trainer.diffusion.process import FLOW, VP, VP_V, Process
from trainer.diffusion.solvers import Euler

EVERY = pytest.mark.parametrize("process", [FLOW, VP, VP_V], ids=repr)


def draws(*shape: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_flow_is_the_straight_line_and_its_velocity() -> None:
    image, noise = torch.tensor([[2.0, -1.0]]), torch.tensor([[10.0, 3.0]])
    assert FLOW.noised(image, noise, 0.25).tolist() == [[4.0, 0.0]]
    assert FLOW.target(image, noise, 0.25).tolist() == [[8.0, 4.0]]
    assert FLOW.image(torch.tensor([[4.0, 0.0]]), torch.tensor([[8.0, 4.0]]), 0.25).tolist() == [[2.0, -1.0]]
    assert FLOW.noise(torch.tensor([[4.0, 0.0]]), torch.tensor([[8.0, 4.0]]), 0.25).tolist() == [[10.0, 3.0]]


def test_vp_keeps_the_variance_and_predicts_noise() -> None:
    image, noise = torch.tensor([[5.0, 10.0]]), torch.tensor([[20.0, -5.0]])
    torch.testing.assert_close(VP.noised(image, noise, 0.6), torch.tensor([[16.0, 5.0]]))
    assert torch.equal(VP.target(image, noise, 0.6), noise)
    torch.testing.assert_close(VP.image(torch.tensor([[16.0, 5.0]]), noise, 0.6), image)
    assert torch.equal(VP.noise(torch.tensor([[16.0, 5.0]]), noise, 0.6), noise)


def test_v_is_what_the_latents_turn_into() -> None:
    # With signal cos(a) and sigma sin(a), v is the derivative of the latents by the angle a (arXiv 2202.00512).
    angle = torch.tensor(0.4, dtype=torch.float64)
    image, noise = draws(2, 3)
    latents = lambda a: torch.cos(a) * image + torch.sin(a) * noise  # noqa: E731
    slope = (latents(angle + 1e-6) - latents(angle - 1e-6)) / 2e-6
    torch.testing.assert_close(VP_V.target(image, noise, torch.sin(angle).item()), slope, rtol=0, atol=1e-9)


def test_without_signal_v_is_the_image_and_a_step_starts_from_it() -> None:
    image, noise, fresh = draws(2, 3, count=3)
    assert torch.equal(VP_V.noised(image, noise, 1.0), noise)
    torch.testing.assert_close(VP_V.target(image, noise, 1.0), -image)
    torch.testing.assert_close(VP_V.image(noise, -image, 1.0), image)
    step = kernels.step("ddim", noise, -image, 1.0, 0.6, 0.5, noise=fresh, process=VP_V)
    mean = 0.8 * image + math.sqrt(0.6**2 - 0.3**2) * noise  # std eta sigma' = 0.3
    torch.testing.assert_close(step.std, torch.full((2,), 0.3))
    torch.testing.assert_close(step.mean, mean.float())
    assert step.log_prob.isfinite().all()


def test_ddim_is_the_same_step_for_noise_and_for_v() -> None:
    image, noise, fresh = (draw.float() for draw in draws(2, 3, count=3))
    for sigma, sigma_next, eta in ((0.99, 0.8, 1.0), (0.6, 0.55, 0.3), (0.3, 0.1, 0.0)):
        steps = []
        for process in (VP, VP_V):
            latents, target = VP.noised(image, noise, sigma), process.target(image, noise, sigma)
            steps.append(kernels.step("ddim", latents, target, sigma, sigma_next, eta, noise=fresh, process=process))
        torch.testing.assert_close(steps[0].mean, steps[1].mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(steps[0].std, steps[1].std)


def test_a_kernel_is_refused_for_another_process() -> None:
    latents, prediction = draws(2, 3)
    with pytest.raises(ValueError, match="kernel dance does not fit models of process vp-v"):
        kernels.step("dance", latents, prediction, 0.9, 0.8, 0.3, noise=latents, process=VP_V)


@EVERY
@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 2, 2), (3, 4, 2, 3, 3)])
def test_the_target_gives_back_image_and_noise(process: Process, shape: tuple[int, ...]) -> None:
    image, noise = draws(*shape)
    for sigma in (0.05, 0.7, 0.99, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)):
        latents, target = process.noised(image, noise, sigma), process.target(image, noise, sigma)
        torch.testing.assert_close(process.image(latents, target, sigma), image)
        torch.testing.assert_close(process.noise(latents, target, sigma), noise)
        torch.testing.assert_close(process.noised(image, noise, sigma), latents)
        torch.testing.assert_close(process.predicting(latents, image, sigma), target)


@EVERY
def test_levels_per_row_are_the_rows_alone(process: Process) -> None:
    image, noise, levels = *draws(3, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    for function in (process.noised, process.image, process.noise, process.target):
        whole = function(image, noise, levels)
        for row, level in enumerate(levels.double().tolist()):
            alone = function(image[row : row + 1], noise[row : row + 1], level)
            torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-6, atol=1e-6)


@EVERY
def test_the_mean_square_error_is_least_at_the_posterior_mean(process: Process) -> None:
    # For images N(0, c^2) and x = a image + s noise, E[image | x] = a c^2 x / (a^2 c^2 + s^2).
    generator, sigma, c = torch.Generator().manual_seed(0), 0.6, 0.5
    image, noise = (torch.randn(200_000, 1, generator=generator) for _ in range(2))
    latents = process.noised(c * image, noise, sigma)
    target = process.target(c * image, noise, sigma)
    slope = (target * latents).sum() / latents.square().sum()  # the best linear prediction
    a = process.signal(sigma)
    expected = a * c**2 / (a**2 * c**2 + sigma**2)
    assert process.image(torch.ones(1, 1), slope.reshape(1, 1), sigma).item() == pytest.approx(expected, abs=0.01)


@EVERY
@pytest.mark.parametrize(("sigma", "sigma_next"), [(0.9, 0.7), (0.5, 0.1), (0.3, 0.0)])
def test_eulers_step_keeps_both_estimates(process: Process, sigma: float, sigma_next: float) -> None:
    image, noise = draws(2, 3, 3)
    latents, target = process.noised(image, noise, sigma), process.target(image, noise, sigma)
    done = Euler(process).step(latents, target, sigma, sigma_next)
    assert done.dtype == torch.float32
    torch.testing.assert_close(done.double(), process.noised(image, noise, sigma_next), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("process", "kernel"), [(FLOW, "ode"), (VP, "ddim"), (VP_V, "ddim")])
def test_eulers_step_is_the_kernel_without_noise_to_the_bit(process: Process, kernel: str) -> None:
    latents, prediction = (draw.float() for draw in draws(2, 3, 3))
    for sigma, sigma_next in ((0.97, 0.9), (0.6, 0.55), (0.2, 0.0)):
        step = kernels.step(kernel, latents, prediction, sigma, sigma_next, 0.0, process=process)
        assert torch.equal(Euler(process).step(latents, prediction, sigma, sigma_next), step.next_sample)


@EVERY
@pytest.mark.parametrize("s", [0.02, 0.7, 0.98])
def test_in_k_diffusions_scale_latents_are_image_and_noise(process: Process, s: float) -> None:
    sigma, (image, noise) = process.from_k_sigma(s), draws(2, 3)
    scale = process.k_scale(sigma)
    latents = process.noised(image, noise, sigma)
    expected = (1 - s) * image + s * noise if process is FLOW else image + s * noise
    torch.testing.assert_close(scale * latents, expected)
    assert sigma * scale == pytest.approx(s, rel=1e-12)
    per_row = process.k_scale(torch.tensor([sigma], dtype=torch.float64))
    assert per_row.item() == pytest.approx(scale, rel=1e-12)
    assert math.isfinite(scale)
