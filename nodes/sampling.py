"""Sampling: the trainer's transition kernels as a SAMPLER, and one initial noise for a whole batch."""

from collections.abc import Callable

import comfy.sample
import torch
from comfy.model_sampling import CONST
from comfy.nested_tensor import NestedTensor
from comfy.samplers import KSAMPLER
from comfy.utils import model_trange
from comfy_api.latest import io
from torch import Tensor

from ..trainer.diffusion import kernels
from ..trainer.utils import seeds
from .types import CATEGORY

DIFFUSION = "ddim"
KERNELS = (*kernels.KERNELS, DIFFUSION)
LARGEST_ETA = 10.0
LAST_STEP = 10_000
MAX_SEED = 0xFFFFFFFFFFFFFFFF

KERNEL_TIP = """The random part of a step. s is sigma, s' the next one, x0 the image and x1 the noise the model sees.
dance (paper): x + v (s' - s) + eta^2/(2 s) x1 (s' - s), std eta sqrt(s - s')
dance-exact: the same SDE solved exactly, so that nothing noisy is left at few steps
flow (Flow-GRPO): as dance with eta sqrt(s/(1 - s)) for eta
flow-exact: the same, solved exactly
cps (FlowCPS): std s' sin(eta pi/2), and that much less of x1
ode: deterministic Euler
ddim: for SD1.5, SDXL and other epsilon or v models; std eta sqrt((1 - a')/(1 - a) (1 - a/a')), a = 1/(1 + s^2)"""

ETA_TIP = """Strength of the noise; 0 is deterministic. Each kernel has its own scale, none that of another sampler.
dance, flow: a diffusion coefficient; 0.3 is the paper's, 0.7 Flow-GRPO's
cps, ddim: 0 to 1, where 1 renoises fully
Euler ancestral's eta runs from 0 (Euler) to 1 (renoised fully); DPM++ SDE's scales an exponent."""


# ------------------------------------------------------------------------------------------------------- one step


def flow_step(
    kernel: str, x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, eta: float, noise: Tensor | None
) -> Tensor:
    """`kernels.step` from the image estimate: velocity is (x - x0) / sigma."""
    return kernels.step(kernel, x, (x - denoised) / sigma, sigma, sigma_next, eta, noise=noise).next_sample


def diffusion_step(
    x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, eta: float, noise: Tensor | None
) -> Tensor:
    """`kernels.ddim_step` in ComfyUI's sigma space, where x = x0 + sigma epsilon and abar = 1 / (1 + sigma^2)."""
    signal, signal_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
    epsilon = (x - denoised) / sigma
    step = kernels.ddim_step(x * signal**0.5, epsilon, signal, signal_next, eta, noise=noise)
    return step.next_sample / signal_next**0.5


def step_noise(x: Tensor, seed: int, first_image: int, sigma: float, device: str) -> Tensor:
    """Standard normal, shaped as `x`; an image's part depends on the seed, its number and sigma alone.

    So an image stays as it is when the batch is split or grown, and when the schedule is split.
    """
    place = x.device if device == "gpu" else "cpu"
    rows = []
    for image in range(first_image, first_image + len(x)):
        generator = torch.Generator(place).manual_seed(seeds.derive(seed, image, sigma))
        rows.append(torch.randn(x.shape[1:], generator=generator, device=place))
    return torch.stack(rows).to(x.device)


@torch.no_grad()
def sample_sde(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback: Callable[[dict], None] | None = None,
    disable: bool | None = None,
    *,
    kernel: str,
    eta: float,
    seed: int,
    start_step: int,
    end_step: int,
    noise_device: str,
    first_image: int,
) -> Tensor:
    """A sampler function of ComfyUI: `model(x, sigma)` gives the image estimate, whatever the network predicts.

    Args:
        x: noisy latents `[B, ...]` of any rank.
        sigmas: T + 1 noise levels.
        start_step, end_step: steps start_step <= i < end_step are stochastic; one to sigma 0 never is.

    Raises:
        ValueError: the kernel is not one for this model.
    """
    model_sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
    flow = isinstance(model_sampling, CONST)
    check_kernel(kernel, eta, flow)
    noise_scale = getattr(model_sampling, "noise_scale", 1.0)
    levels, extra_args = sigmas.tolist(), extra_args or {}
    for i in model_trange(len(levels) - 1, disable=disable):
        sigma, sigma_next = levels[i], levels[i + 1]
        denoised = model(x, sigmas[i].expand(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        stochastic = kernel != "ode" and eta > 0 and start_step <= i < end_step and 0 < sigma_next < sigma
        noise = noise_scale * step_noise(x, seed, first_image, sigma, noise_device) if stochastic else None
        strength = eta if stochastic else 0.0
        if flow:
            x = flow_step(kernel if stochastic else "ode", x, denoised, sigma, sigma_next, strength, noise)
        else:
            x = diffusion_step(x, denoised, sigma, sigma_next, strength, noise)
    return x


def check_kernel(kernel: str, eta: float, flow: bool) -> None:
    """Raise ValueError where kernel, eta and the kind of model do not fit."""
    if kernel == "ode":
        return
    if flow and kernel == DIFFUSION:
        raise ValueError(f"kernel is 'ddim', and this is a flow model: choose one of {', '.join(kernels.KERNELS)}")
    if not flow and kernel != DIFFUSION:
        raise ValueError(f"kernel is {kernel!r}, and this model predicts epsilon or v: choose ddim or ode")
    check_eta(kernel, eta)


def check_eta(kernel: str | None, eta: float | None) -> None:
    """Raise ValueError for a kernel that does not exist or an eta that it does not take; None is not known yet."""
    if kernel not in (*KERNELS, None):
        raise ValueError(f"kernel is {kernel!r}: choose one of {', '.join(KERNELS)}")
    if eta is None:
        return
    if not 0 <= eta <= LARGEST_ETA:
        raise ValueError(f"eta is {eta}: it must lie in 0 to {LARGEST_ETA:g}")
    if kernel == DIFFUSION and eta > 1:
        raise ValueError(f"eta is {eta}: ddim takes 0 to 1")
    if kernel == "cps" and eta >= 2:
        raise ValueError(f"eta is {eta}: cps takes 0 to below 2 (1 renoises fully)")


# ------------------------------------------------------------------------------------------------------- the nodes


class SDESampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_SDESampler",
            display_name="SDE Sampler (DanceGRPO)",
            category=f"{CATEGORY}/sampling",
            description="Samples with the transition kernels that GRPO trains with. For SamplerCustomAdvanced.",
            search_aliases=["sde", "grpo", "eta", "stochastic sampler", "flow sde", "flow-grpo", "cps", "ddim eta"],
            inputs=[
                io.Combo.Input("kernel", options=list(KERNELS), default="dance", tooltip=KERNEL_TIP),
                io.Float.Input("eta", default=0.3, min=0.0, max=LARGEST_ETA, step=0.01, round=False, tooltip=ETA_TIP),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seed of the steps' noise. The initial noise has a seed of its own, in the NOISE node.",
                ),
                io.Int.Input("start_step", default=0, min=0, max=LAST_STEP, tooltip="First stochastic step."),
                io.Int.Input(
                    "end_step",
                    default=LAST_STEP,
                    min=0,
                    max=LAST_STEP,
                    tooltip="Steps from this one on are deterministic; so is the last in any case.",
                ),
                io.Combo.Input(
                    "noise_device",
                    options=["cpu", "gpu"],
                    default="cpu",
                    advanced=True,
                    tooltip="Where noise is drawn. cpu gives the same image on every machine.",
                ),
                io.Int.Input(
                    "first_image",
                    default=0,
                    min=0,
                    max=LAST_STEP,
                    advanced=True,
                    tooltip="Number of the batch's first image. Image 3 of a batch is made alone with a 3 here.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        kernel: str | None = None,
        eta: float | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
    ) -> bool | str:
        # A value that arrives by wire is not known yet; a named one is no longer looked at by ComfyUI itself.
        try:
            check_eta(kernel, eta)
        except ValueError as error:
            return str(error)
        start = 0 if start_step is None else start_step
        end = LAST_STEP if end_step is None else end_step
        if 0 <= start <= end:
            return True
        return f"start_step is {start} and end_step {end}: they must not be negative, nor the start above the end"

    @classmethod
    def execute(cls, **options: object) -> io.NodeOutput:
        return io.NodeOutput(KSAMPLER(sample_sde, extra_options=options))


class SharedNoise:
    """A NOISE: what RandomNoise gives the first image, for every image of the batch."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generate_noise(self, input_latent: dict) -> Tensor | NestedTensor:
        latents = input_latent["samples"]
        parts = latents.unbind() if latents.is_nested else [latents]
        first = [part[:1] for part in parts]
        drawn = comfy.sample.prepare_noise(NestedTensor(first) if latents.is_nested else first[0], self.seed)
        noises = drawn.unbind() if latents.is_nested else [drawn]
        whole = [noise.expand(part.shape).clone() for noise, part in zip(noises, parts, strict=True)]
        return NestedTensor(whole) if latents.is_nested else whole[0]


class GroupNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_GroupNoise",
            display_name="Group Noise (DanceGRPO)",
            category=f"{CATEGORY}/sampling",
            description="One initial noise for every image of the batch, as DanceGRPO samples its groups. "
            "What then differs between the images is the noise of the steps alone.",
            search_aliases=["shared noise", "same noise", "grpo group", "batch noise"],
            inputs=[
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Seed of the initial noise: what RandomNoise gives the first image for this seed.",
                )
            ],
            outputs=[io.Noise.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, noise_seed: int) -> io.NodeOutput:
        return io.NodeOutput(SharedNoise(noise_seed))


NODES = [SDESampler, GroupNoise]
