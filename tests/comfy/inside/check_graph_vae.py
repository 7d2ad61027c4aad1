"""ComfyUI's VAEs behind the trainer's interface: decoding in parts, and encoding as core's own node does it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.ldm.wan.vae
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE
from core_networks import TINY_WAN, core_model
from safetensors.torch import save_file
from tiny_graphs import CPU, LTXV
from torch import Tensor, nn

import nodes as comfy_nodes


def stirred(module: nn.Module) -> dict[str, Tensor]:
    """Random weights for a module, the same every time; norms stay near one."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, value in module.state_dict().items():
        one = value.is_floating_point() and value.ndim > 0 and ("gamma" in name or "std-of-means" in name)
        weights[name] = float(one) + 0.1 * torch.randn(value.shape, generator=generator)
    return weights


def core_vae(weights: dict[str, Tensor], **options: Any) -> Any:
    """Core only warns of weights a file lacks and leaves them uninitialised, which is NaN on some days."""
    vae = comfy.sd.VAE(sd=dict(weights), dtype=torch.float32, **options)
    assert set(weights) >= set(vae.first_stage_model.state_dict())
    return vae


def wan_vae() -> Any:
    network = comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])
    return core_vae(stirred(network))


def ltx_vae() -> Any:
    """One with noise in its decoder, as from LTX-Video 0.9.1 on."""
    block = ["res_x", {"num_layers": 1}]
    config = {
        "dims": 3,
        "latent_channels": 128,
        "patch_size": 4,
        "norm_layer": "pixel_norm",
        "latent_log_var": "uniform",
        "encoder_base_channels": 8,
        "decoder_base_channels": 8,
        "encoder_blocks": [block, *[["compress_all", {}]] * 3],
        "decoder_blocks": [*[["compress_all", {"residual": False}]] * 3, block],
        "timestep_conditioning": True,
    }
    weights = stirred(VideoVAE(config=config))
    return core_vae(weights, metadata={"config": json.dumps({"vae": config})})


def graph_model(pack: Callable, core: str, network: dict, vae: Any, **size: int) -> Any:
    base = core_model(core, network, torch.float32, None, "cpu")
    patcher = comfy.model_patcher.ModelPatcher(base, CPU, CPU)
    graph = {"folder": "x", "file": "x", "vae_file": "x"}
    config = pack("trainer.config").ModelConfig(family="comfy", graph=graph, **size)
    return pack("trainer.models.comfy.model").ComfyModel(patcher, vae, config)


def sized(model: Any, **changes: object) -> Any:
    model.config = model.config.model_copy(update=changes)
    return model


def test_images_of_the_embedded_model_are_encoded_as_through_the_other_door(pack, demo) -> None:
    models, config = pack("trainer.models"), pack("trainer.config").ModelConfig(decode_batch_size=2)
    graph = {"folder": "x", "file": "x", "vae_file": "x"}
    connected = config.model_copy(
        update={"family": "comfy", "graph": pack("trainer.config").GraphModel(**graph), "decode_batch_size": 2}
    )
    ours = pack("trainer.models.comfy.model").ComfyModel(demo.model, demo.vae, connected)
    theirs = models.FAMILIES["sd3"].load(config, CPU)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    latents = ours.encode_image(images)
    assert (latents - theirs.encode_image(images)).abs().max() < 1e-4
    core = comfy_nodes.VAEEncode().encode(demo.vae, images.movedim(1, -1))[0]["samples"]
    assert (latents - demo.model.model.process_latent_in(core)).abs().max() < 1e-5
    assert (ours.decode(latents) - theirs.decode(latents)).abs().max() < 1e-4
    with pytest.raises(pack("trainer.utils.errors").BadInput, match="images to encode have size 3 x 32 x 64"):
        ours.encode_image(images[:, :, :32])


@pytest.mark.parametrize("frames", [1, 5])
def test_videos_are_encoded_as_core_encodes_them(pack, frames: int) -> None:
    model = graph_model(pack, "WAN21_T2V", TINY_WAN, wan_vae(), height=32, width=16, frames=frames)
    shape = (3, *((frames,) if frames > 1 else ()), 3, 32, 16)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    latents = model.encode_image(images)
    assert latents.shape == (3, *model.latent_shape)
    for video, own in zip(images, latents, strict=True):
        as_frames = (video if frames > 1 else video[None]).movedim(1, -1)
        core = comfy_nodes.VAEEncode().encode(model.vae, as_frames)[0]["samples"]
        assert (model.base.process_latent_in(core)[0] - own).abs().max() < 1e-5
    decoded = model.decode(latents)
    assert decoded.shape == images.shape
    assert 0 <= decoded.min() < decoded.max() <= 1


@pytest.mark.parametrize("name", ["wan", "ltx", "embedded"])
def test_images_do_not_depend_on_how_many_are_decoded_at_once(pack, demo, name: str, monkeypatch) -> None:
    if name == "embedded":
        config = pack("trainer.config").ModelConfig(
            family="comfy", graph={"folder": "x", "file": "x", "vae_file": "x"}, height=64, width=64
        )
        model = pack("trainer.models.comfy.model").ComfyModel(demo.model, demo.vae, config)
    elif name == "wan":
        model = graph_model(pack, "WAN21_T2V", TINY_WAN, wan_vae(), height=32, width=16, frames=5)
    else:
        model = graph_model(pack, "LTXV", LTXV, ltx_vae(), height=64, width=64, frames=9)
    latents = torch.randn(5, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    whole = sized(model, decode_batch_size=5).decode(latents)
    assert whole[0].std() > 1e-3
    state = torch.random.get_rng_state()
    for size in (1, 2):
        torch.manual_seed(size)
        before = torch.random.get_rng_state()
        assert (sized(model, decode_batch_size=size).decode(latents) - whole).abs().max() < 5e-5
        assert torch.equal(torch.random.get_rng_state(), before), "decoding draws from nobody else's noise"
    torch.random.set_rng_state(state)
    if name == "ltx":
        swapped = model.decode(latents.flip(0)).flip(0)
        assert torch.equal(swapped, model.decode(latents)), "every image has the same noise"
        scaled = model.base.process_latent_out(latents[:1])
        first, second = model.vae.decode(scaled), model.vae.decode(scaled)
        assert (first - second).abs().max() > 1e-3, "by itself this VAE would give something else each time"


def test_decoding_needs_no_gradient_and_lets_it_through(pack) -> None:
    model = graph_model(pack, "WAN21_T2V", TINY_WAN, wan_vae(), height=32, width=16, frames=1)
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    assert not model.decode(latents).requires_grad
    latents.requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.decode(latents)[1].sum(), latents)
    assert gradient[1].abs().sum() > 0
    assert not gradient[0].any()


def test_a_vae_that_mixes_the_images_of_a_batch_is_refused(pack, demo) -> None:
    class VideoDecoder(nn.Module):
        """Of Stable Video Diffusion: it takes a batch as the frames of one video."""

    vae = demo.vae
    check, bad = pack("trainer.models.comfy.load").check_vae, pack("trainer.utils.errors").BadInput
    check(vae, demo.model.model.latent_format)
    wrong = type("Wrong", (), {"decoder": VideoDecoder()})
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(vae, "first_stage_model", wrong)
        with pytest.raises(bad, match="because it mixes the images of a batch"):
            check(vae, demo.model.model.latent_format)


def test_a_file_that_lacks_weights_of_the_decoder_is_refused_with_their_names(pack, tmp_path: Path) -> None:
    network = comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])
    weights, load = stirred(network), nn.Module.load_state_dict
    graph = pack("trainer.config").GraphModel(folder="x", file="x", vae_file=str(tmp_path / "vae.safetensors"))

    def loaded(lacking: tuple[str, ...]) -> Any:
        save_file({k: v for k, v in weights.items() if k not in lacking}, tmp_path / "vae.safetensors")
        modules = pack("trainer.models.comfy.model")._modules()
        return pack("trainer.models.comfy.load").load_vae(graph, modules)

    decoder = [name for name in weights if name.startswith("decoder.")]
    encoder = [name for name in weights if name.startswith("encoder.") and name.endswith(".bias")]
    assert loaded(()) is not None
    assert loaded((encoder[0],)) is not None, "decoding does not use it"
    lacking = next(name for name in decoder if name.endswith("conv1.bias"))
    with pytest.raises(pack("trainer.utils.errors").BadInput, match="lacks 1 weights of the VAE's decoder") as raised:
        loaded((lacking,))
    assert lacking in str(raised.value)
    assert nn.Module.load_state_dict is load
