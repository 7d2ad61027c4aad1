"""Sampling: the trainer's transition kernels as a SAMPLER, and one initial noise for a whole batch."""

from collections.abc import Callable

import comfy.sample
import torch
from comfy.model_sampling import CONST, V_PREDICTION
from comfy.nested_tensor import NestedTensor
from comfy.samplers import KSAMPLER
from comfy.utils import model_trange
from comfy_api.latest import io
from torch import Tensor

from ..trainer.diffusion import kernels
from ..trainer.diffusion.kernels import KERNELS, LARGEST_ETA, Kernel
from ..trainer.diffusion.process import FLOW, VP, VP_V, Process
from ..trainer.diffusion.solvers import Euler
from ..trainer.utils import seeds
from .types import CATEGORY

LAST_STEP = 10_000
MAX_SEED = 0xFFFFFFFFFFFFFFFF


def kernel_tip() -> str:
    """What each kernel does, a line each."""
    lines = [f"{k.name} ({k.process.name}): {k.mean}; std {k.std}" for k in KERNELS.values()]
    notation = (
        "The random part of a step. s is sigma, s' the next one; x0 and x1 are the model's estimates of the image and "
        "the noise in the latents x, and v = x1 - x0. Kernels marked flow are for flow models, those marked vp for "
        "SD1.5, SDXL and other epsilon or v models, with a = 1/(1 + s²); ode is for all."
    )
    return "\n".join([notation, *lines]).replace("`", "")


def eta_tip() -> str:
    """The scale of eta in each kernel, a line each."""
    lines = [
        f"{k.name}: 0 to {k.largest_eta:g}, usually {k.default_eta:g}" for k in KERNELS.values() if not k.deterministic
    ]
    head = "Strength of the noise; 0 is deterministic. Each kernel has its own scale, which no other sampler shares."
    return "\n".join([head, *lines])


# ------------------------------------------------------------------------------------------------------- one step


def take_step(
    process: Process,
    kernel: Kernel,
    x: Tensor,
    denoised: Tensor,
    sigma: float,
    sigma_next: float,
    eta: float,
    noise: Tensor | None,
) -> Tensor:
    """One step of the trainer in ComfyUI's scale of latents and noise levels (see `Process.k_scale`).

    Args:
        x, denoised: latents `[B, ...]` and the model's image estimate.
        sigma, sigma_next: ComfyUI's noise levels.
        noise: standard normal, shaped as `x`; None for a deterministic step.

    Returns:
        latents at `sigma_next`, shaped as `x`.
    """
    level, level_next = process.from_k_sigma(sigma), process.from_k_sigma(sigma_next)
    latents = x / process.k_scale(level)
    prediction = process.predicting(latents, denoised, level)
    if noise is None:
        latents = Euler(process).step(latents, prediction, level, level_next)
    else:
        latents = kernels.step(
            kernel, latents, prediction, level, level_next, eta, noise=noise, process=process
        ).next_sample
    return latents * process.k_scale(level_next)


def step_noise(x: Tensor, seed: int, first_image: int, sigma: float, device: str) -> Tensor:
    """Standard normal noise, shaped as `x`; an image's part depends on the seed, its number and sigma alone.

    So an image stays as it is when the batch is split or grown, and when the schedule is split.
    """
    device = x.device if device == "gpu" else "cpu"
    rows = []
    for image in range(first_image, first_image + len(x)):
        generator = torch.Generator(device).manual_seed(seeds.derive(seed, image, sigma))
        rows.append(torch.randn(x.shape[1:], generator=generator, device=device))
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
        ValueError: the kernel does not fit this model.
    """
    model_sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
    process = FLOW if isinstance(model_sampling, CONST) else VP_V if isinstance(model_sampling, V_PREDICTION) else VP
    check_kernel(kernel, eta, process)
    chosen = kernels.named(kernel)
    noise_scale = getattr(model_sampling, "noise_scale", 1.0)
    levels, extra_args = sigmas.tolist(), extra_args or {}
    for i in model_trange(len(levels) - 1, disable=disable):
        sigma, sigma_next = levels[i], levels[i + 1]
        denoised = model(x, sigmas[i].expand(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        stochastic = not chosen.deterministic and eta > 0 and start_step <= i < end_step and 0 < sigma_next < sigma
        noise = noise_scale * step_noise(x, seed, first_image, sigma, noise_device) if stochastic else None
        x = take_step(process, chosen, x, denoised, sigma, sigma_next, eta, noise)
    return x


def check_kernel(kernel: str, eta: float, process: Process) -> None:
    """Raise ValueError where kernel, eta and the model's process do not fit."""
    chosen = kernels.named(kernel)
    if chosen.deterministic:
        return
    if not chosen.fits(process):
        what = "this is a flow model" if process is FLOW else "this model predicts epsilon or v"
        fitting = [*kernels.stochastic(process), *(k.name for k in KERNELS.values() if k.deterministic)]
        raise ValueError(f"kernel is {kernel!r}, and {what}: choose one of {', '.join(fitting)}")
    chosen.check_eta(eta)


def check_eta(kernel: str | None, eta: float | None) -> None:
    """Raise ValueError for a kernel that does not exist or an eta that it does not take; None is not known yet."""
    if eta is not None and not 0 <= eta <= LARGEST_ETA:
        raise ValueError(f"eta is {eta}: it must lie in 0 to {LARGEST_ETA:g}")
    if kernel is not None and eta is not None:
        kernels.named(kernel).check_eta(eta)
    elif kernel is not None:
        kernels.named(kernel)


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
                io.Combo.Input("kernel", options=list(KERNELS), default="dance", tooltip=kernel_tip()),
                io.Float.Input(
                    "eta",
                    default=kernels.DANCE.default_eta,
                    min=0.0,
                    max=LARGEST_ETA,
                    step=0.01,
                    round=False,
                    tooltip=eta_tip(),
                ),
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
