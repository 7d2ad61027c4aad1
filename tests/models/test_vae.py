"""Decoding in parts and encoding images, with every family's VAE; memory counted before anything is loaded."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tiny_families import FLUX_VAE, hunyuan_vae, image_vae, qwen_vae, wan_vae
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.models import FAMILIES
from trainer.models.diffusers.family import DiffusersModel
from trainer.shapes.world import Scene, SceneObject, render
from trainer.utils.errors import BadInput

CPU = torch.device("cpu")
PLAYGROUND = {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]}
"""Of Playground v2.5, an SDXL whose VAE has moments per channel beside its scaling factor."""


def tiny_sd3_vae() -> nn.Module:
    return image_vae(16, scaling_factor=1.5305, shift_factor=0.0609)


def of_images(pipeline: str) -> Callable[[Any, Tensor], Tensor]:
    """Encoding in one of diffusers' image-to-image pipelines."""
    return lambda own, pixels: getattr(diffusers, pipeline).prepare_latents(
        own, pixels, None, len(pixels), 1, torch.float32, CPU
    )


def of_packed_images(pipeline: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda own, pixels: getattr(diffusers, pipeline)._encode_vae_image(own, pixels, None)


def of_qwen(own: Any, pixels: Tensor) -> Tensor:
    return of_packed_images("QwenImageImg2ImgPipeline")(own, pixels.unsqueeze(2))[:, :, 0]


def of_wan(own: Any, pixels: Tensor) -> Tensor:
    video = pixels.transpose(1, 2) if pixels.ndim == 5 else pixels.unsqueeze(2)
    size = {"height": video.shape[3], "width": video.shape[4]}
    return diffusers.WanVideoToVideoPipeline.prepare_latents(
        own, video, len(video), 16, **size, dtype=torch.float32, device=CPU
    )


def of_skyreels(own: Any, pixels: Tensor) -> Tensor:
    """One frame: its pipeline has no encoding of videos."""
    size = {"height": pixels.shape[2], "width": pixels.shape[3], "num_frames": 1}
    return diffusers.HunyuanSkyreelsImageToVideoPipeline.prepare_latents(
        own, pixels, len(pixels), 4, **size, dtype=torch.float32, device=CPU
    )[1]


CASES = {
    "sd": ("sd", lambda: image_vae(4, scaling_factor=0.18215), 1, of_images("StableDiffusionImg2ImgPipeline")),
    "sdxl": ("sdxl", lambda: image_vae(4, scaling_factor=0.13025), 1, of_images("StableDiffusionXLImg2ImgPipeline")),
    "playground": (
        "sdxl",
        lambda: image_vae(4, scaling_factor=0.5, **PLAYGROUND),
        1,
        of_images("StableDiffusionXLImg2ImgPipeline"),
    ),
    "sd3": ("sd3", tiny_sd3_vae, 1, of_images("StableDiffusion3Img2ImgPipeline")),
    "flux": ("flux", lambda: image_vae(16, **FLUX_VAE), 1, of_packed_images("FluxImg2ImgPipeline")),
    "qwen-image": ("qwen-image", qwen_vae, 1, of_qwen),
    "wan": ("wan", wan_vae, 5, of_wan),
    "wan-image": ("wan", wan_vae, 1, of_wan),
    "hunyuanvideo": ("hunyuanvideo", hunyuan_vae, 5, None),
    "hunyuanvideo-image": ("hunyuanvideo", hunyuan_vae, 1, of_skyreels),
}


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> DiffusersModel:
    """The family's model with its VAE, read from a folder, and no network."""
    family, build, frames, _ = CASES[name]
    folder = tmp_path_factory.mktemp(name)
    build().save_pretrained(folder / "vae")
    config = ModelConfig(family=family, path=str(folder), height=32, width=16, frames=frames)
    return without_network(config)


def without_network(config: ModelConfig) -> DiffusersModel:
    from trainer.models.diffusers.vae import load_vae

    model = object.__new__(FAMILIES[config.family])
    model.config, model.vae = config, load_vae(model.folder(config), config, CPU)
    model.module = nn.Linear(1, 1)  # says where the model is
    return model


def draw_images(model: DiffusersModel, count: int) -> Tensor:
    config = model.config
    frames = () if config.frames == 1 else (config.frames,)
    return torch.rand(count, *frames, 3, config.height, config.width, generator=torch.Generator().manual_seed(1))


def test_encoding_is_that_of_the_familys_own_pipeline(
    name: str, model: DiffusersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, frames, own = CASES[name]
    images = draw_images(model, 2)
    latents = model.encode_image(images)
    assert torch.equal(model.encode_image(images), latents), "encoding must not be random"
    assert latents.dtype == torch.float32
    assert model.decode(latents).shape == images.shape
    if own is None:  # no pipeline encodes its videos: the mean times the scaling factor, the first frame by itself
        moments = model.vae.encode(images.transpose(1, 2) * 2 - 1).latent_dist.mean
        torch.testing.assert_close(latents, moments * model.vae.config.scaling_factor)
        return
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    keep = SimpleNamespace(scale_noise=lambda image, *_: image)
    if not name.startswith("wan"):  # it asks for the one it has
        keep.add_noise = lambda image, *_: image
    pipeline = SimpleNamespace(
        vae=model.vae,
        scheduler=keep,
        vae_scaling_factor=model.vae.config.get("scaling_factor"),
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
    )
    torch.testing.assert_close(latents, own(pipeline, images * 2 - 1).reshape(latents.shape), rtol=1e-5, atol=1e-6)


def test_images_do_not_depend_on_how_many_are_decoded_at_once(
    model: DiffusersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = model.encode_image(draw_images(model, 5)).shape
    latents = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    calls = []
    monkeypatch.setattr(model.vae, "decode", counted(model.vae.decode, calls))
    whole = model.decode(latents)
    for size, sizes in ((1, [1] * 5), (2, [2, 2, 1]), (5, [5])):
        calls.clear()
        monkeypatch.setattr(model, "config", model.config.model_copy(update={"decode_batch_size": size}))
        torch.testing.assert_close(model.decode(latents), whole, rtol=0, atol=1e-4)  # rounding: 3% of an 8-bit level
        assert calls == sizes
    assert whole.std() > 1e-3
    others = whole.roll(1, dims=0)
    assert all((one - other).abs().max() > 0.05 for one, other in zip(whole, others, strict=True)), "images differ"


def counted(decode: Callable, calls: list[int]) -> Callable:
    def call(latents: Tensor, **options: Any) -> Any:
        calls.append(len(latents))
        return decode(latents, **options)

    return call


@pytest.mark.parametrize(
    ("height", "width", "frames", "count"),
    [(64, 64, 1, 32), (512, 512, 1, 4), (720, 720, 1, 2), (1024, 1024, 1, 1), (2048, 2048, 1, 1), (480, 832, 33, 1)],
)
def test_as_many_images_as_make_a_megapixel_are_decoded_at_once(
    height: int, width: int, frames: int, count: int
) -> None:
    model = object.__new__(FAMILIES["wan"])
    model.config = ModelConfig(height=height, width=width, frames=frames)
    assert model.decode_batch_size == count
    model.config = ModelConfig(height=height, width=width, frames=frames, decode_batch_size=7)
    assert model.decode_batch_size == 7


def test_gradients_flow_through_decoding(model: DiffusersModel) -> None:
    latents = torch.zeros_like(model.encode_image(draw_images(model, 3))).requires_grad_(True)
    images = model.decode(latents)
    (gradient,) = torch.autograd.grad(images[1].sum(), latents)
    assert gradient[1].abs().sum() > 0
    assert not gradient[0].any() and not gradient[2].any()
    assert not model.decode(latents.detach()).requires_grad


def test_images_of_another_size_are_refused(model: DiffusersModel) -> None:
    images = draw_images(model, 1)
    with pytest.raises(
        BadInput, match="images to encode have size .*3 x 16 x 16, but the model needs .*3 x 32 x 16: resize"
    ):
        model.encode_image(images[..., :16, :])


def test_the_embedded_autoencoder_gives_images_back() -> None:
    model = without_network(ModelConfig())
    images = render(
        [Scene((SceneObject("circle", "red", 20, 30, 12), SceneObject("square", "blue", 45, 40, 10)), (0.9, 0.9, 0.9))]
    )
    latents = model.encode_image(images)
    assert latents.shape == (1, 16, 8, 8)
    assert 0.5 < latents.std() < 2, "latents of the network's scale"
    assert (model.decode(latents) - images).abs().mean() < 0.04
