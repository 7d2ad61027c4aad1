"""The SDE sampler and the group noise, through ComfyUI's own guider, against core's samplers and the trainer."""

from types import SimpleNamespace

import comfy.k_diffusion.sampling as core
import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.nested_tensor import NestedTensor

FLOW = ["dance", "dance-exact", "flow", "flow-exact", "cps"]
SIGMAS = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


@pytest.fixture
def sampler(pack: object) -> object:
    """The node's SAMPLER."""

    def make(**options: object) -> object:
        defaults = {"kernel": "dance", "eta": 0.3, "seed": 3, "start_step": 0, "end_step": 10_000}
        defaults |= {"noise_device": "cpu", "first_image": 0}
        return pack("nodes.sampling").SDESampler.execute(**(defaults | options)).result[0]

    return make


def largest(first: torch.Tensor, second: torch.Tensor) -> float:
    assert first.shape == second.shape
    assert first.isfinite().all()
    return (first - second).abs().max().item()


# ------------------------------------------------------------------------------------------------------ flow models


@pytest.mark.parametrize("kernel", [*FLOW, "ode"])
def test_without_eta_it_is_cores_euler(sampler, sample, noise, kernel) -> None:
    euler = sample(comfy.samplers.ksampler("euler"), SIGMAS, noise, cfg=3.0)
    assert largest(sample(sampler(kernel=kernel, eta=0.0), SIGMAS, noise, cfg=3.0), euler) < 1e-6


@pytest.mark.parametrize("kernel", FLOW)
def test_same_seed_same_image_other_seed_another(sampler, sample, noise, kernel) -> None:
    first = sample(sampler(kernel=kernel), SIGMAS, noise)
    assert torch.equal(first, sample(sampler(kernel=kernel), SIGMAS, noise))
    assert largest(first, sample(sampler(kernel=kernel, seed=4), SIGMAS, noise)) > 1e-2
    assert largest(first, sample(sampler(kernel="ode"), SIGMAS, noise)) > 1e-2


@pytest.mark.parametrize("kernel", FLOW)
def test_an_image_does_not_depend_on_its_batch(sampler, sample, noise, kernel) -> None:
    whole = sample(sampler(kernel=kernel), SIGMAS, noise)
    for image in range(4):
        alone = sample(sampler(kernel=kernel, first_image=image), SIGMAS, noise[image : image + 1])
        assert largest(alone[0], whole[image]) < 5e-5  # the network's own rounding differs between batch sizes


def test_images_of_a_batch_get_different_noise(sampler, sample, noise) -> None:
    images = sample(sampler(), SIGMAS, noise[:1].expand(4, -1, -1, -1).clone())
    assert min(largest(images[i], images[j]) for i in range(4) for j in range(i)) > 1e-2


@pytest.mark.parametrize(("kernel", "guidance"), [(kernel, 1.0) for kernel in FLOW] + [("cps", 3.0)])
def test_the_trajectory_is_the_trainers(pack, demo, sampler, sample, noise, kernel, guidance) -> None:
    rollout, sampling = pack("trainer.rollout"), pack("nodes.sampling")
    sd3 = pack("trainer.models.diffusers.sd3").SD3Model
    config = pack("trainer.config").ModelConfig()
    prompts = ["a red circle above a blue square", ""]
    conditions = sd3.encode(config, prompts, torch.device("cpu"))
    plan = rollout.Plan(kernel, 0.4, SIGMAS.tolist(), [True] * 4 + [False], False, guidance)
    trained = rollout.sample(
        sd3.load(config, torch.device("cpu")),
        plan,
        rollout.Prompting(conditions.rows(torch.tensor([0])), conditions.rows(torch.tensor([1]))),
        torch.zeros(4, dtype=torch.long),
        noise,
        lambda i: sampling.step_noise(noise, 3, 0, SIGMAS.tolist()[i], "cpu"),
    )
    seen = []
    latents = sample(
        sampler(kernel=kernel, eta=0.4), SIGMAS, noise, cfg=guidance, callback=lambda i, x0, x, n: seen.append(x)
    )
    assert largest(latents, trained.final) < 1e-4
    for step in range(4):
        assert largest(seen[step + 1], trained.next_samples[step]) < 1e-4


def test_only_the_window_is_random(sampler, sample, noise) -> None:
    def path(**options: object) -> list[torch.Tensor]:
        seen = []
        sample(sampler(**options), SIGMAS, noise, callback=lambda i, x0, x, n: seen.append(x))
        return seen

    plain, windowed = path(kernel="ode"), path(start_step=1, end_step=3)
    assert [torch.equal(a, b) for a, b in zip(plain, windowed, strict=True)] == [True, True, False, False, False]
    # Past the window the steps are deterministic: velocity carries step 3 to step 4.
    other = path(start_step=1, end_step=4)
    assert torch.equal(windowed[3], other[3])
    assert largest(windowed[4], other[4]) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(plain, path(start_step=2, end_step=2), strict=True))


@pytest.mark.parametrize("kernel", ["dance", "cps"])
def test_a_split_schedule_gives_the_whole_ones_image(sampler, sample, demo, noise, kernel) -> None:
    whole = sample(sampler(kernel=kernel), SIGMAS, noise)
    half = sample(sampler(kernel=kernel), SIGMAS[:3], noise)
    latent = demo.model.model.process_latent_out(half)
    rest = sample(sampler(kernel=kernel), SIGMAS[2:], torch.zeros_like(noise), latent=latent)
    assert largest(rest, whole) < 1e-5


def test_a_masked_latent_is_kept_where_the_mask_is_zero(sampler, sample, demo, noise) -> None:
    latent = demo.model.model.process_latent_out(torch.randn(noise.shape, generator=torch.Generator().manual_seed(8)))
    mask = torch.zeros(4, 1, 8, 8)
    mask[..., 4:] = 1
    done = demo.model.model.process_latent_out(sample(sampler(), SIGMAS, noise, latent=latent, denoise_mask=mask))
    assert largest(done[..., :4], latent[..., :4]) < 1e-5
    assert largest(done[..., 4:], latent[..., 4:]) > 0.1


def test_every_step_is_reported_and_an_interrupt_ends_it(sampler, sample, noise) -> None:
    steps = []
    sample(sampler(), SIGMAS, noise, callback=lambda i, x0, x, total: steps.append((i, total, tuple(x0.shape))))
    assert steps == [(i, 5, tuple(noise.shape)) for i in range(5)]

    def stop(i: int, *unused: object) -> None:
        steps.append(i)
        if i == 1:
            raise comfy.model_management.InterruptProcessingException

    steps.clear()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(sampler(), SIGMAS, noise, callback=stop)
    assert steps == [0, 1]


# ------------------------------------------------------------------------------------- epsilon and v-prediction models


@pytest.fixture(scope="module", params=["eps", "v_prediction", "zero_snr"])
def diffusion(request: pytest.FixtureRequest) -> object:
    """`run(sampler)` samples from a random model of Stable Diffusion 1.5's class."""
    torch.manual_seed(0)
    config = comfy.supported_models.SD15(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": [1, 1],
            "channel_mult": (1, 2),
            "transformer_depth": [1, 1],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1, 1, 1, 1],
            "context_dim": 32,
            "num_heads": 4,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": False,
            "use_temporal_attention": False,
            "adm_in_channels": None,
            "legacy": False,
        }
    )
    if request.param == "zero_snr":
        config.sampling_settings = {"zsnr": True}
    if request.param != "eps":
        config.model_type = lambda *unused: comfy.model_base.ModelType.V_PREDICTION
    model = config.get_model({}, "", device="cpu").float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    cpu = torch.device("cpu")
    patcher = ModelPatcher(model, load_device=cpu, offload_device=cpu)
    cond = [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "normal", 6)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))

    def run(sampler: object, images: slice = slice(None)) -> torch.Tensor:
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(cond, cond)
        start = noise[images]
        return guider.sample(start, torch.zeros_like(start), sampler, sigmas, disable_pbar=True, seed=1)

    # With zero terminal SNR core's own first latents are rounded at 4519 times their size.
    return SimpleNamespace(run=run, rounding=3e-4 if request.param == "zero_snr" else 1e-5)


@pytest.mark.parametrize("kernel", ["ddim", "ode"])
def test_without_eta_it_is_cores_ddim(sampler, diffusion, kernel) -> None:
    expected = diffusion.run(comfy.samplers.sampler_object("ddim"))
    assert (
        largest(diffusion.run(sampler(kernel=kernel, eta=0.0)), expected)
        < diffusion.rounding * expected.abs().max().item()
    )


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddims_eta_is_the_ancestral_step_of_k_diffusion(pack, sampler, diffusion, eta) -> None:
    # In sigma space DDIM's std is eta sigma_up of the ancestral step (Song et al., eq. 16; Karras' notation).
    sampling = pack("nodes.sampling")

    def ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None):
        levels = sigmas.tolist()
        for i in range(len(levels) - 1):
            denoised = model(x, sigmas[i].expand(len(x)), **extra_args)
            down, up = core.get_ancestral_step(levels[i], levels[i + 1], eta=eta)
            x = denoised + (x - denoised) / levels[i] * down
            if levels[i + 1] > 0:
                x = x + up * sampling.step_noise(x, 3, 0, levels[i], "cpu")
        return x

    expected = diffusion.run(comfy.samplers.KSAMPLER(ancestral))
    assert (
        largest(diffusion.run(sampler(kernel="ddim", eta=eta)), expected)
        < diffusion.rounding * expected.abs().max().item()
    )


def test_an_image_of_a_diffusion_model_does_not_depend_on_its_batch(sampler, diffusion) -> None:
    whole = diffusion.run(sampler(kernel="ddim", eta=1.0))
    assert torch.equal(whole, diffusion.run(sampler(kernel="ddim", eta=1.0)))
    size = whole.abs().max().item()
    for image in range(len(whole)):
        alone = diffusion.run(sampler(kernel="ddim", eta=1.0, first_image=image), slice(image, image + 1))
        assert largest(alone[0], whole[image]) < 5e-5 * size
    assert largest(diffusion.run(sampler(kernel="ddim", eta=1.0, seed=4)), whole) > 1e-2 * size


# ------------------------------------------------------------------------------------------------------ any latent


class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    pass


def stub(sampling: object, denoise: object) -> object:
    """What KSAMPLER hands to a sampler function."""

    class Stub:
        inner_model = SimpleNamespace(model_patcher=SimpleNamespace(get_model_object=lambda name: sampling))

        def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **unused: object) -> torch.Tensor:
            return denoise(x, sigma)

    return Stub()


@pytest.mark.parametrize("shape", [(2, 1, 30), (2, 4, 6, 6), (2, 4, 3, 6, 6)])
@pytest.mark.parametrize("kernel", FLOW)
def test_latents_of_any_rank(sampler, shape, kernel) -> None:
    x = torch.randn(shape)
    image = torch.full(shape, 0.5)
    seen = []
    chosen = sampler(kernel=kernel)
    model = stub(Flow(), lambda x, sigma: image)
    done = chosen.sampler_function(model, x, SIGMAS, callback=seen.append, disable=True, **chosen.extra_options)
    assert largest(done, image) < 1e-5  # the last step goes to what the model sees, with no noise on it
    assert len(seen) == 5


@pytest.mark.parametrize("levels", [[], [0.7]])
def test_no_step_no_change(sampler, levels) -> None:
    x, chosen = torch.randn(1, 4, 4, 4), sampler()
    model = stub(Flow(), lambda x, sigma: x)
    done = chosen.sampler_function(model, x, torch.tensor(levels), disable=True, **chosen.extra_options)
    assert torch.equal(done, x)


@pytest.mark.parametrize("kernel", FLOW)
def test_a_models_noise_scale_scales_latents_and_noise_alike(sampler, kernel) -> None:
    # x = (1 - sigma) x0 + sigma s n is the plain process for x / s.
    chosen = sampler(kernel=kernel, eta=0.5)
    scaled = Flow()
    scaled.noise_scale = 2.0
    x, image = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)

    def run(sampling: object, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        model = stub(sampling, lambda x, sigma: image)
        return chosen.sampler_function(model, x, SIGMAS[:4], disable=True, **chosen.extra_options)

    assert largest(run(scaled, 2 * x, 2 * image), 2 * run(Flow(), x, image)) < 1e-5


@pytest.mark.parametrize(
    ("kernel", "eta", "process", "words"),
    [
        ("ddim", 0.5, "FLOW", "'ddim' is not for flow models: choose one of dance, .*cps, ode$"),
        ("dance", 0.3, "VP", "'dance' is not for epsilon or v-prediction models: choose one of ddim, ode$"),
        ("ddim", 1.5, "VP", "eta 1.5 is outside the range of kernel ddim: 0 to 1"),
        ("cps", 2.0, "FLOW", "eta 2 is outside the range of kernel cps: 0 to 1"),
    ],
)
def test_a_kernel_that_does_not_fit_is_refused_in_words(pack, kernel, eta, process, words) -> None:
    with pytest.raises(ValueError, match=words):
        pack("nodes.sampling").check_kernel(kernel, eta, getattr(pack("trainer.diffusion.process"), process))


def test_a_kernel_registered_in_the_trainer_is_a_choice_of_the_nodes_and_samples(pack, sampler, monkeypatch) -> None:
    kernels, frozen = pack("trainer.diffusion.kernels"), pack("trainer.diffusion.kernels.base").frozen_image
    new = kernels.Kernel(
        name="renoise",
        process=pack("trainer.diffusion.process").FLOW,
        coefficients=lambda sigma, sigma_next, eta: frozen(sigma, sigma_next, torch.zeros_like(sigma)),
        default_eta=0.5,
        largest_eta=0.5,
        mean="(1 - s') x0",
        std="s'",
        summary="all noise fresh at every step",
    )
    monkeypatch.setitem(kernels.KERNELS, "renoise", new)
    choice = pack("nodes.sampling").SDESampler.define_schema().inputs[0]
    assert choice.options == list(kernels.KERNELS)
    assert "renoise (flow): (1 - s') x0; std s'" in choice.tooltip
    assert "renoise" in pack("nodes.settings").widget("rollout.kernel").options
    image, x = torch.full((2, 4, 6, 6), 0.5), torch.randn(2, 4, 6, 6)
    model = stub(Flow(), lambda x, sigma: image)

    def run(kernel: str, eta: float) -> torch.Tensor:
        chosen = sampler(kernel=kernel, eta=eta)
        return chosen.sampler_function(model, x, SIGMAS[:4], disable=True, **chosen.extra_options)

    assert largest(run("renoise", 0.5), run("cps", 1.0)) < 1e-6  # which renoises fully too
    assert largest(run("renoise", 0.5), run("cps", 0.5)) > 1e-2


# ------------------------------------------------------------------------------------------------------ group noise


def test_group_noise_is_random_noises_first_image_for_all(pack) -> None:
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise

    latent = {"samples": torch.zeros(3, 4, 8, 8)}
    drawn = pack("nodes.sampling").GroupNoise.execute(noise_seed=9).result[0]
    assert drawn.seed == 9
    group = drawn.generate_noise(latent)
    one = Noise_RandomNoise(9).generate_noise({"samples": torch.zeros(1, 4, 8, 8)})
    assert torch.equal(group, one.expand(3, -1, -1, -1))


def test_group_noise_of_nested_latents(pack) -> None:
    latents = NestedTensor([torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 5)])
    first, second = pack("nodes.sampling").SharedNoise(1).generate_noise({"samples": latents}).unbind()
    assert (first.shape, second.shape) == ((2, 4, 8, 8), (2, 3, 5))
    assert torch.equal(first[0], first[1])
    assert torch.equal(second[0], second[1])
    assert second.std() > 0.3
