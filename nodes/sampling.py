"""Nodes for sampling: the trainer's transition kernels as a SAMPLER, and a NOISE that is equal for a whole batch."""

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
from ..trainer.utils.errors import BadInput
from .host import inputs
from .types import CATEGORY

LAST_STEP = 10_000
MAX_SEED = 0xFFFFFFFFFFFFFFFF


def kernel_tip() -> str:
    """Tooltip of `kernel`: the formulas of each kernel, one line per kernel."""
    lines = [f"{k.name} ({k.process.name}): {k.mean}; std {k.std}" for k in KERNELS.values()]
    notation = (
        "How a sampling step adds noise: the next latents are the mean plus the std times new noise. s is sigma, and "
        "s' the next one; x0 and x1 are the model's estimates of the image and the noise in the latents x, and "
        "v = x1 - x0. Kernels marked flow are for flow models, those marked vp for SD1.5, SDXL and other epsilon or "
        "v-prediction models, with a = 1/(1 + s²); ode works with all models."
    )
    return "\n".join([notation, *lines]).replace("`", "")


def eta_tip() -> str:
    """Tooltip of `eta`: its range and usual value for each kernel, one line per kernel."""
    lines = [
        f"{k.name}: 0 to {k.largest_eta:g}, usually {k.default_eta:g}" for k in KERNELS.values() if not k.deterministic
    ]
    head = "Strength of the added noise; 0 is deterministic. The same value has a different effect in each kernel."
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
    """One sampling step of the trainer, for latents and noise levels in ComfyUI's scale (see `Process.k_scale`).

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
    """Standard normal noise, shaped as `x`. The noise of an image depends only on the seed, its number and sigma.

    An image therefore does not change when the batch is split or enlarged, or when the sigmas are split.
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
    """A sampler function for ComfyUI: `model(x, sigma)` returns the image estimate, whatever the network predicts.

    Args:
        x: noisy latents `[B, ...]` of any rank.
        sigmas: T + 1 noise levels.
        start_step, end_step: steps start_step <= i < end_step are stochastic, except a step to sigma 0.

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
    """Raise ValueError if the kernel or eta cannot be used with a model of this process."""
    chosen = kernels.named(kernel)
    if chosen.deterministic:
        return
    if not chosen.fits(process):
        what = "is not for flow models" if process is FLOW else "is not for epsilon or v-prediction models"
        fitting = [*kernels.stochastic(process), *(k.name for k in KERNELS.values() if k.deterministic)]
        raise ValueError(f"kernel {kernel!r} {what}: choose one of {', '.join(fitting)}")
    chosen.check_eta(eta)


# ------------------------------------------------------------------------------------------------------- the nodes


class SDESampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_SDESampler",
            display_name="SDE Sampler (DanceGRPO)",
            category=f"{CATEGORY}/sampling",
            description="Stochastic sampler with the transition kernels that GRPO training uses.",
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
                    tooltip="Seed of the noise that the steps add. The NOISE node has the seed of the initial noise.",
                ),
                io.Int.Input("start_step", default=0, min=0, max=LAST_STEP, tooltip="First stochastic step."),
                io.Int.Input(
                    "end_step",
                    default=LAST_STEP,
                    min=0,
                    max=LAST_STEP,
                    tooltip="This step and all later ones are deterministic. The step to sigma 0 always is.",
                ),
                io.Combo.Input(
                    "noise_device",
                    options=["cpu", "gpu"],
                    default="cpu",
                    advanced=True,
                    tooltip="Where the noise is drawn. With cpu it is the same on every machine.",
                ),
                io.Int.Input(
                    "first_image",
                    default=0,
                    min=0,
                    max=LAST_STEP,
                    advanced=True,
                    tooltip="Number of the first image of the batch. Set it to 3 to sample image 3 of a batch alone.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom.")],
        )

    @classmethod
    def execute(cls, kernel: str, eta: float, start_step: int, end_step: int, **options: object) -> io.NodeOutput:
        # Not in validate_inputs: ComfyUI would repeat the refusal at every input that it names.
        try:
            kernels.named(kernel).check_eta(inputs.finite(eta, "eta"))
        except ValueError as error:
            raise BadInput(str(error)) from error
        if start_step > end_step:
            raise BadInput(
                f"start_step is {start_step} and end_step is {end_step}: use a start_step of at most end_step"
            )
        options |= {"kernel": kernel, "eta": eta, "start_step": start_step, "end_step": end_step}
        return io.NodeOutput(KSAMPLER(sample_sde, extra_options=options))


class SharedNoise:
    """A NOISE that gives every image of the batch the noise that RandomNoise gives the first image."""

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
            description="The same initial noise for every image of the batch, as in DanceGRPO's groups. The images "
            "then differ only by the noise that the sampling steps add, so use it with SDE Sampler.",
            search_aliases=["shared noise", "same noise", "grpo group", "batch noise"],
            inputs=[
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Seed of the noise. It equals the noise of RandomNoise for the first image with this seed.",
                )
            ],
            outputs=[io.Noise.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, noise_seed: int) -> io.NodeOutput:
        return io.NodeOutput(SharedNoise(noise_seed))


NODES = [SDESampler, GroupNoise]
