"""Transition kernels against transcriptions of their sources, and against simulation."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.diffusion import kernels
from trainer.diffusion.process import FLOW, VP

STOCHASTIC = ["dance", "dance-exact", "flow", "flow-exact", "cps"]
EXACT = ["dance-exact", "flow-exact", "cps"]


def shifted(steps: int, shift: float = 3.0) -> list[float]:
    even = np.linspace(1, 0, steps + 1)
    return list(shift * even / (1 + (shift - 1) * even))


def pairs(steps: int, shift: float = 3.0) -> list[tuple[float, float]]:
    sigmas = shifted(steps, shift)
    return list(zip(sigmas[:-1], sigmas[1:], strict=True))


def draws(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A latent, a velocity and a noise."""
    return tuple(torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed)))


# ------------------------------------------------------------------------- transcriptions of the references' functions


def flux_step(x: Tensor, v: Tensor, sigma: float, sigma_next: float, eta: float, z: Tensor) -> tuple[Tensor, ...]:
    """DanceGRPO, train_grpo_flux.py."""
    dsigma = sigma_next - sigma
    pred_original_sample = x - sigma * v
    std = eta * math.sqrt(sigma - sigma_next)
    score_estimate = -(x - pred_original_sample * (1 - sigma)) / sigma**2
    mean = x + dsigma * v + (-0.5 * eta**2 * score_estimate) * dsigma
    x_next = mean + std * z
    log_prob = -((x_next - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    return x_next, mean, std, log_prob.mean(dim=tuple(range(1, x.ndim)))


def sde_step(x: Tensor, v: Tensor, sigma: float, sigma_next: float, a: float, z: Tensor) -> tuple[Tensor, ...]:
    """Flow-GRPO, sd3_sde_with_logprob.py, sde_type "sde"; a trajectory's second sigma stands in at sigma = 1."""
    dt = sigma_next - sigma
    std_dev_t = math.sqrt(sigma / (1 - (sigma_next if sigma == 1 else sigma))) * a
    mean = x * (1 + std_dev_t**2 / (2 * sigma) * dt) + v * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
    std = std_dev_t * math.sqrt(-dt)
    x_next = mean + std * z
    log_prob = -((x_next - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    return x_next, mean, std, log_prob.mean(dim=tuple(range(1, x.ndim)))


def cps_step(x: Tensor, v: Tensor, sigma: float, sigma_next: float, a: float, z: Tensor) -> tuple[Tensor, ...]:
    """Flow-GRPO, sde_type "cps", with the density normalised (theirs drops 1 / (2 std^2) and the constants)."""
    std = sigma_next * math.sin(a * math.pi / 2)
    x0, x1 = x - sigma * v, x + v * (1 - sigma)
    mean = x0 * (1 - sigma_next) + x1 * math.sqrt(sigma_next**2 - std**2)
    x_next = mean + std * z
    log_prob = -((x_next - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    return x_next, mean, std, log_prob.mean(dim=tuple(range(1, x.ndim)))


@pytest.mark.parametrize(
    ("kernel", "reference", "eta"),
    [
        ("dance", flux_step, 0.3),
        ("dance", flux_step, 0.7),
        ("flow", sde_step, 0.7),
        ("flow", sde_step, 1.2),
        ("cps", cps_step, 0.8),
        ("cps", cps_step, 0.3),
        ("cps", cps_step, 1.3),  # beyond full renoising the root stays positive
    ],
)
def test_kernel_equals_its_reference(kernel: str, reference: Callable, eta: float) -> None:
    x, v, z = draws(2, 4, 3, 3)
    for sigma, sigma_next in pairs(16)[:-1]:
        step = kernels.step(kernel, x, v, sigma, sigma_next, eta, noise=z)
        x_next, mean, std, log_prob = reference(x.double(), v.double(), sigma, sigma_next, eta, z.double())
        torch.testing.assert_close(step.next_sample.double(), x_next, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.std.double(), torch.full((2,), std).double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(step.log_prob.double(), log_prob, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- moments


def moments(kernel: str, sigma: float, sigma_next: float, eta: float) -> tuple[float, float, float]:
    """What one step makes of an image estimate of 1 and of a noise estimate of 1, and its standard deviation."""
    sample = torch.tensor([[1 - sigma, sigma]])
    velocity = torch.tensor([[-1.0, 1.0]])
    step = kernels.step(kernel, sample, velocity, sigma, sigma_next, eta, noise=torch.zeros(1, 2))
    image, noise = step.mean[0].tolist()
    return image, noise, step.std.item()


def diffusion(kernel: str, sigma: float, eta: float) -> float:
    return eta if kernel == "dance-exact" else eta * math.sqrt(sigma / (1 - sigma))


def simulated(kernel: str, sigma: float, sigma_next: float, eta: float, steps: int) -> tuple[float, float, float]:
    """The same by Euler-Maruyama in many small steps with the image estimate frozen at its first value."""
    image, noise, variance = 1 - sigma, sigma, 0.0
    dt = (sigma_next - sigma) / steps
    for k in range(steps):
        level = sigma + k * dt
        g2 = diffusion(kernel, level, eta) ** 2
        # dx = (v + g^2 / (2 sigma) x1) dt + g dW with x1 = (x - (1 - sigma) x0) / sigma and v = x1 - x0
        pull = (1 + g2 / (2 * level)) * dt / level
        image = image * (1 + pull) - (1 - level) * pull - dt
        noise *= 1 + pull
        variance = variance * (1 + pull) ** 2 - g2 * dt
    return image, noise, math.sqrt(variance)


@pytest.mark.parametrize("kernel", ["dance-exact", "flow-exact"])
@pytest.mark.parametrize(("sigma", "sigma_next", "eta"), [(0.9, 0.75, 0.7), (1 / 3, 1 / 6, 0.3), (0.6, 0.1, 0.5)])
def test_exact_kernel_equals_many_small_steps(kernel: str, sigma: float, sigma_next: float, eta: float) -> None:
    expected = simulated(kernel, sigma, sigma_next, eta, 100_000)
    assert moments(kernel, sigma, sigma_next, eta) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_published_spread_of_the_exact_dance_kernel() -> None:
    assert moments("dance-exact", 1 / 3, 1 / 6, 0.3)[2] == pytest.approx(0.0811, abs=5e-5)
    assert moments("dance", 1 / 3, 1 / 6, 0.3)[2] == pytest.approx(0.1225, abs=5e-5)


@pytest.mark.parametrize("kernel", ["dance-exact", "flow-exact"])
def test_exact_kernel_equals_random_trajectories(kernel: str) -> None:
    sigma, sigma_next, eta, steps, image = 0.5, 0.3, 0.6, 200, 0.4
    rng = np.random.default_rng(0)
    x = np.full(20_000, (1 - sigma) * image + sigma * 1.3)
    dt = (sigma_next - sigma) / steps
    for level in sigma + dt * np.arange(steps):
        g = diffusion(kernel, level, eta)
        noise = (x - (1 - level) * image) / level
        x += (noise - image + g**2 / (2 * level) * noise) * dt + g * math.sqrt(-dt) * rng.standard_normal(x.size)
    on_image, on_noise, std = moments(kernel, sigma, sigma_next, eta)
    assert x.mean() == pytest.approx(on_image * image + on_noise * 1.3, abs=4 * std / math.sqrt(x.size) + 2e-3)
    assert x.std() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("kernel", EXACT)
@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_exact_kernels_keep_the_noise_level(kernel: str, eta: float) -> None:
    for steps in range(4, 51):
        for sigma, sigma_next in pairs(steps):
            image, noise, std = moments(kernel, sigma, sigma_next, eta)
            assert image == pytest.approx(1 - sigma_next, abs=1e-5)
            assert math.hypot(noise, std) == pytest.approx(sigma_next, rel=1e-5, abs=1e-6)
            assert sigma_next == 0 or std > 0


def test_excess_noise_of_the_euler_kernels_is_the_documented_one() -> None:
    def level(kernel: str, sigma: float, sigma_next: float, eta: float) -> float:
        return math.hypot(*moments(kernel, sigma, sigma_next, eta)[1:])

    assert level("dance", *pairs(16)[-1], 0.3) == pytest.approx(0.130, abs=1e-3)
    assert level("dance", *pairs(10)[-1], 0.3) == pytest.approx(0.157, abs=1e-3)
    assert level("dance", *pairs(10)[-1], 0.7) == pytest.approx(0.427, abs=1e-3)
    assert level("flow", *pairs(10)[-1], 0.7) == pytest.approx(0.218, abs=1e-3)
    sigma, sigma_next = pairs(16)[-2]
    assert level("dance", sigma, sigma_next, 0.3) / sigma_next == pytest.approx(1.10, abs=5e-3)


def test_flow_exact_at_full_noise_takes_the_next_level_for_its_own() -> None:
    sigma_next, a = 0.9, 0.7
    keep = (sigma_next / (1 - sigma_next) / (1 / (1 - sigma_next))) ** (a * a / 2)
    expected = (1 - sigma_next, sigma_next * keep, sigma_next * math.sqrt(1 - keep**2))
    assert moments("flow-exact", 1.0, sigma_next, a) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------- shared by all kernels


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_without_eta_every_kernel_is_the_ode(kernel: str) -> None:
    x, v, z = draws(2, 3, 4)
    for sigma, sigma_next in pairs(8):
        step = kernels.step(kernel, x, v, sigma, sigma_next, 0.0, noise=z)
        torch.testing.assert_close(step.next_sample, x + v * (sigma_next - sigma), rtol=1e-6, atol=1e-6)
        assert step.std.tolist() == [0, 0]
        assert step.log_prob.tolist() == [0, 0]


@pytest.mark.parametrize("kernel", [*STOCHASTIC, "ddim"])
def test_without_eta_no_noise_is_needed(kernel: str) -> None:
    x, v, z = draws(2, 3, 4)
    step = kernels.step(kernel, x, v, 0.8, 0.6, 0.0)
    assert torch.equal(step.next_sample, kernels.step(kernel, x, v, 0.8, 0.6, torch.zeros(2), noise=z).next_sample)
    assert torch.equal(kernels.step(kernel, x, v, 0.8, 0.6, torch.zeros(2)).next_sample, step.next_sample)


def test_ode_needs_no_noise_and_has_no_density() -> None:
    x, v, z = draws(2, 3, 4)
    step = kernels.step("ode", x, v, 1.0, 0.8, 0.3)
    torch.testing.assert_close(step.next_sample, x - 0.2 * v)
    assert torch.equal(kernels.step("ode", x, v, 1.0, 0.8, 0.3, noise=z).next_sample, step.next_sample)
    assert step.log_prob.tolist() == step.std.tolist() == [0, 0]


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_log_prob_is_the_mean_normal_density(kernel: str) -> None:
    x, v, z = draws(2, 4, 5, 5)
    step = kernels.step(kernel, x, v, 0.8, 0.6, 0.5, noise=z)
    mean, std = step.mean.double(), step.std.double()[:, None, None, None]
    expected = torch.distributions.Normal(mean, std).log_prob(step.next_sample.double()).mean((1, 2, 3))
    torch.testing.assert_close(step.log_prob.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", [*STOCHASTIC, "ode"])
@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 4), (2, 2, 3, 4)])
@pytest.mark.parametrize("per_row", [False, True])
def test_replay_gives_the_very_log_probability(kernel: str, shape: tuple[int, ...], per_row: bool) -> None:
    x, v, z = draws(3, *shape)
    sigma, sigma_next = (torch.tensor([1.0, 0.7, 0.4]), torch.tensor([0.9, 0.6, 0.1])) if per_row else (0.7, 0.6)
    taken = kernels.step(kernel, x, v, sigma, sigma_next, 0.4, noise=z)
    scored = kernels.step(kernel, x, v, sigma, sigma_next, 0.4, next_sample=taken.next_sample)
    assert torch.equal(scored.log_prob, taken.log_prob)
    assert torch.equal(scored.next_sample, taken.next_sample)
    assert taken.log_prob.shape == taken.std.shape == (3,)
    assert {t.dtype for t in (taken.next_sample, taken.mean, taken.std, taken.log_prob)} == {torch.float32}
    assert kernel == "ode" or (taken.log_prob != 0).all()


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_levels_per_row_equal_the_rows_alone(kernel: str) -> None:
    x, v, z = draws(3, 2, 4)
    sigmas, nexts, etas = [1.0, 0.7, 0.4], [0.9, 0.6, 0.1], [0.3, 0.5, 0.7]
    levels = (torch.tensor(value, dtype=torch.float64) for value in (sigmas, nexts, etas))
    together = kernels.step(kernel, x, v, *levels, noise=z)
    for i, (sigma, sigma_next, eta) in enumerate(zip(sigmas, nexts, etas, strict=True)):
        row = slice(i, i + 1)
        alone = kernels.step(kernel, x[row], v[row], sigma, sigma_next, eta, noise=z[row])
        assert torch.equal(together.next_sample[row], alone.next_sample)
        torch.testing.assert_close(together.log_prob[row], alone.log_prob, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", [*STOCHASTIC, "ode"])
@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.9), (0.2, 0.0), (1.0, 0.0)])
def test_both_ends_are_finite_with_their_gradients(kernel: str, sigma: float, sigma_next: float) -> None:
    x, v, z = draws(2, 3, 4)
    v.requires_grad_(True)
    step = kernels.step(kernel, x, v, sigma, sigma_next, 0.5, noise=z)
    stored = step.next_sample.detach() + 0.01
    replay = kernels.step(kernel, x, v, sigma, sigma_next, 0.5, next_sample=stored)
    (gradient,) = torch.autograd.grad(replay.log_prob.sum(), v)
    for value in (step.next_sample, step.mean, step.std, step.log_prob, replay.log_prob, gradient):
        assert value.isfinite().all()
    if (replay.std == 0).all():
        assert replay.log_prob.tolist() == [0, 0]
        assert not gradient.any()
    assert (replay.std == 0).all() == (kernel == "ode" or (kernel in EXACT and sigma_next == 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_any_type_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, v, z = (t.to(dtype) for t in draws(2, 3, 4))
    other = kernels.step("dance", x, v, 0.8, 0.6, 0.5, noise=z)
    full = kernels.step("dance", x.float(), v.float(), 0.8, 0.6, 0.5, noise=z.float())
    assert torch.equal(other.next_sample, full.next_sample)
    assert torch.equal(other.mean, full.mean)
    assert torch.equal(other.log_prob, full.log_prob)


def test_wrong_arguments_are_named() -> None:
    x, v, z = draws(2, 3)
    with pytest.raises(ValueError, match=r"'euler' is unknown.*dance-exact"):
        kernels.step("euler", x, v, 1.0, 0.8, 0.3, noise=z)
    for wrong in ({}, {"noise": z, "next_sample": x}, {"noise": z, "next_sample": z}):
        with pytest.raises(ValueError, match="exactly one"):
            kernels.step("dance", x, v, 1.0, 0.8, 0.3, **wrong)
        with pytest.raises(ValueError, match="exactly one"):
            kernels.step("ddim", x, v, 0.7, 0.5, 1.0, **wrong)
    with pytest.raises(ValueError, match="exactly one"):
        kernels.step("ode", x, v, 1.0, 0.8, 0.3, noise=z, next_sample=x)


# -------------------------------------------------------------------------------------------------------------- ddim


def level(alpha_bar: Tensor) -> float:
    """The noise level of a cumulative signal level."""
    return (1 - alpha_bar.double()).sqrt().item()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(eta: float) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(10)
    x, epsilon, z = draws(2, 4, 3, 3)
    for t in scheduler.timesteps.tolist():
        expected = scheduler.step(epsilon, t, x, eta=eta, variance_noise=z).prev_sample
        following = t - 100
        alpha_next = scheduler.alphas_cumprod[following] if following >= 0 else scheduler.final_alpha_cumprod
        sigma, sigma_next = level(scheduler.alphas_cumprod[t]), level(alpha_next)
        step = kernels.step("ddim", x, epsilon, sigma, sigma_next, eta, noise=z)
        torch.testing.assert_close(step.next_sample, expected, rtol=1e-4, atol=1e-5)
        assert (step.std > 0).all() == (eta > 0 and following >= 0)
        replay = kernels.step("ddim", x, epsilon, sigma, sigma_next, eta, next_sample=step.next_sample)
        assert torch.equal(replay.log_prob, step.log_prob)
        assert step.log_prob.isfinite().all()


def test_ddim_without_eta_needs_no_noise() -> None:
    x, epsilon, z = draws(2, 3)
    step = kernels.step("ddim", x, epsilon, 0.7, 0.5, 0.0)
    assert torch.equal(step.next_sample, kernels.step("ddim", x, epsilon, 0.7, 0.5, 0.0, noise=z).next_sample)
    assert step.log_prob.tolist() == [0, 0]


def test_ddim_log_prob_is_the_mean_normal_density() -> None:
    x, epsilon, z = draws(2, 3, 4)
    step = kernels.step("ddim", x, epsilon, math.sqrt(0.7), math.sqrt(0.4), 1.0, noise=z)
    std = math.sqrt((1 - 0.6) / (1 - 0.3) * (1 - 0.3 / 0.6))
    mean = math.sqrt(0.6) * (x - math.sqrt(0.7) * epsilon) / math.sqrt(0.3) + math.sqrt(0.4 - std**2) * epsilon
    expected = torch.distributions.Normal(mean, std).log_prob(mean + std * z).mean((1, 2))
    torch.testing.assert_close(step.log_prob, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- registry


def test_the_registry_holds_the_kernels_under_their_names() -> None:
    assert list(kernels.KERNELS) == [*STOCHASTIC, "ddim", "ode"]
    assert all(kernel.name == name for name, kernel in kernels.KERNELS.items())
    assert kernels.stochastic() == [*STOCHASTIC, "ddim"]
    assert (kernels.stochastic(FLOW), kernels.stochastic(VP)) == (STOCHASTIC, ["ddim"])
    assert [name for name, kernel in kernels.KERNELS.items() if kernel.deterministic] == ["ode"]


def test_a_kernel_is_taken_by_name_or_itself() -> None:
    x, v, z = draws(2, 3)
    named, itself = (kernels.step(kernel, x, v, 0.8, 0.6, 0.5, noise=z) for kernel in ("cps", kernels.CPS))
    assert torch.equal(named.next_sample, itself.next_sample)


@pytest.mark.parametrize(("kernel", "largest"), [("dance", 10), ("flow-exact", 10), ("cps", 1), ("ddim", 1)])
def test_eta_is_bounded_by_the_kernel(kernel: str, largest: float) -> None:
    chosen = kernels.named(kernel)
    chosen.check_eta(0.0)
    chosen.check_eta(chosen.default_eta)
    chosen.check_eta(largest)
    for wrong in (-0.1, largest + 0.01, math.nan):
        with pytest.raises(ValueError, match=f"outside the range of kernel {kernel}: 0 to {largest}"):
            chosen.check_eta(wrong)


def test_ode_takes_any_eta_and_ignores_it() -> None:
    kernels.named("ode").check_eta(5.0)


def test_a_kernels_own_default_lies_in_its_range() -> None:
    with pytest.raises(ValueError, match="kernel x: 0 <= default_eta"):
        kernels.Kernel("x", FLOW, kernels.CPS.coefficients, 1.5, 1.0, mean="", std="", summary="")
