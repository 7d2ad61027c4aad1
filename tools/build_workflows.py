"""Writes the example graphs: each as the interface saves it, and its API twin.

    python -m tools.build_workflows http://127.0.0.1:8188

The address is that of a running ComfyUI with this pack, whose node descriptions give widgets and sockets.
"""

import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from . import embedded_workflows, released_workflows, voting_workflows
from .workflow_graph import Graph, Layout, interface_graph

FOLDER = Path(__file__).resolve().parents[1] / "workflows"



@dataclass(frozen=True)
class Example:
    """A kind of model.

    Attributes:
        name: of the graph.
        run: name of its run and LoRA.
        loaders: nodes by name; `model`, `clip` and `vae` say which outputs of theirs are the model's.
        patch: a ModelSampling node and its widgets.
        size: width, height and frames in training.
        full: the same as the released model is used.
        preset: settings, and lines that change them.
        guidance: true guidance; 1 is none.
        scheduler: a name of core's, or the node that makes SIGMAS and its widgets.
        embedded: guidance that the network takes as an input.
        latent: the node of empty latents and the name of its size's third widget.
        first_frame: core's node that adds a first frame to conditioning.
        says: the note: files, the real model's settings, and where they are from.
    """

    name: str
    run: str
    loaders: dict[str, tuple[str, dict]]
    model: tuple[str, int]
    clip: tuple[str, int]
    vae: tuple[str, int]
    size: tuple[int, int, int]
    steps: int
    preset: str
    says: str
    overrides: tuple[str, ...] = ()
    patch: tuple[str, dict] | None = None
    guidance: float = 1.0
    scheduler: str | tuple[str, dict] = "simple"
    embedded: float | None = None
    latent: str = "EmptySD3LatentImage"
    negative: str = ""
    kernel: tuple[str, float] = ("dance-exact", 0.5)
    first_frame: str = ""
    fps: float = 16.0
    checkpointing: bool = field(default=True)

    @property
    def is_video(self) -> bool:
        return self.size[2] > 1


def parts(network: str, encoders: tuple[str, dict], vae: str) -> dict:
    """Loaders of a model whose network, text encoders and VAE are files of their own."""
    return {
        "network": ("UNETLoader", {"unet_name": network, "weight_dtype": "default"}),
        "encoders": encoders,
        "autoencoder": ("VAELoader", {"vae_name": vae}),
    }


def one_encoder(file: str, kind: str) -> tuple[str, dict]:
    return "CLIPLoader", {"clip_name": file, "type": kind}


def two_encoders(first: str, second: str, kind: str) -> tuple[str, dict]:
    return "DualCLIPLoader", {"clip_name1": first, "clip_name2": second, "type": kind}


SINGLE = {"model": ("checkpoint", 0), "clip": ("checkpoint", 1), "vae": ("checkpoint", 2)}
SEPARATE = {"model": ("network", 0), "clip": ("encoders", 0), "vae": ("autoencoder", 0)}
DIFFUSION = {"kernel": ("ddim", 1.0), "latent": "EmptyLatentImage"}
WAN_NEGATIVE = "overexposed, static, blurred details, subtitles, worst quality, low quality, deformed, still picture"

EXAMPLES = (
    Example(
        name="7 Train SD1.5",
        run="sd15_lora",
        loaders={"checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": "v1-5-pruned-emaonly-fp16.safetensors"})},
        **SINGLE,
        **DIFFUSION,
        size=(512, 512, 1),
        steps=20,
        preset="one-gpu-sd14",
        guidance=5.0,
        scheduler="normal",
        negative="blurry, watermark",
        says="""`v1-5-pruned-emaonly-fp16.safetensors` in `models/checkpoints`: network, text encoder and VAE.

| | here | the model as released |
|---|---|---|
| size | 512 x 512 | 512 x 512 |
| steps | 20 | 50 (model card), 20 (ComfyUI's template) |
| guidance | 5, the paper's | 7.5 (model card) |
| kernel | `ddim`, eta 1, the paper's for SD1.4 | |""",
    ),
    Example(
        name="8 Train SDXL",
        run="sdxl_lora",
        loaders={"checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": "sd_xl_base_1.0.safetensors"})},
        **SINGLE,
        **DIFFUSION,
        size=(768, 768, 1),
        steps=20,
        preset="one-gpu-sd14",
        overrides=("rollout.batch_size=4", "objective.batch_size=1"),
        guidance=5.0,
        scheduler="normal",
        negative="text, watermark",
        says="""`sd_xl_base_1.0.safetensors` in `models/checkpoints`: network, both text encoders and VAE.

| | here | the model as released |
|---|---|---|
| size | 768 x 768, for time and memory | 1024 x 1024 |
| steps | 20 | 25 (ComfyUI's template), 50 (diffusers) |
| guidance | 5 | 8 (ComfyUI's template), 5 (diffusers) |
| kernel | `ddim`, eta 1, the paper's for SD1.4 | |""",
    ),
    Example(
        name="9 Train SD3.5",
        run="sd35_lora",
        loaders={
            "checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": "sd3.5_medium.safetensors"}),
            "encoders": (
                "TripleCLIPLoader",
                {
                    "clip_name1": "clip_l.safetensors",
                    "clip_name2": "clip_g.safetensors",
                    "clip_name3": "t5xxl_fp8_e4m3fn_scaled.safetensors",
                },
            ),
        },
        model=("checkpoint", 0),
        clip=("encoders", 0),
        vae=("checkpoint", 2),
        size=(512, 512, 1),
        steps=10,
        preset="one-gpu-flux",
        overrides=("rollout.steps=10", "rollout.guidance_scale=4.5", "objective.updates=1"),
        guidance=4.5,
        patch=("ModelSamplingSD3", {"shift": 3.0}),
        negative="blurry, watermark",
        says="""`sd3.5_medium.safetensors` (network and VAE) in `models/checkpoints`; `clip_l.safetensors`, `clip_g.safetensors` and `t5xxl_fp8_e4m3fn_scaled.safetensors` in `models/text_encoders`. SD3.5 large goes in the same place, also as `fp8_scaled`.

| | here | the model as released |
|---|---|---|
| size | 512 x 512, Flow-GRPO's | 1024 x 1024 |
| steps | 10, Flow-GRPO's | 40 (model card) |
| guidance | 4.5, Flow-GRPO's | 4.5 (model card) |
| shift | 3 | 3 (the model's scheduler) |""",
    ),
    Example(
        name="10 Train FLUX.1",
        run="flux1_lora",
        loaders=parts(
            "flux1-dev.safetensors",
            two_encoders("clip_l.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors", "flux"),
            "ae.safetensors",
        ),
        **SEPARATE,
        size=(512, 512, 1),
        steps=12,
        preset="one-gpu-flux",
        embedded=3.5,
        says="""`flux1-dev.safetensors` in `models/diffusion_models` (24 GB in bf16; set *weight_dtype* to `fp8_e4m3fn` for half of it), `clip_l.safetensors` and `t5xxl_fp8_e4m3fn_scaled.safetensors` in `models/text_encoders`, `ae.safetensors` in `models/vae`.

| | here | the model as released |
|---|---|---|
| size | 512 x 512 | 1024 x 1024; the paper trains at 720 x 720 |
| steps | 12, the paper's LoRA script | 20 (ComfyUI's template), 50 (model card) |
| embedded guidance | 3.5, by *FluxGuidance* | 3.5 (model card and paper) |
| true guidance | none | none |
| shift | ComfyUI's own for FLUX, e^1.15 = 3.16 | 3 in the paper |""",
    ),
    Example(
        name="11 Train FLUX.2",
        run="flux2_lora",
        loaders=parts(
            "flux-2-klein-base-4b.safetensors",
            one_encoder("qwen_3_4b.safetensors", "flux2"),
            "flux2-vae.safetensors",
        ),
        **SEPARATE,
        size=(512, 512, 1),
        steps=12,
        preset="one-gpu-flux",
        overrides=("rollout.guidance_scale=5", "objective.updates=1", "rollout.batch_size=6", "objective.batch_size=2"),
        guidance=5.0,
        scheduler=("Flux2Scheduler", {"steps": 12, "width": 512, "height": 512}),
        latent="EmptyFlux2LatentImage",
        says="""FLUX.2 klein, the base model of 4 billion weights, which fits one card: `flux-2-klein-base-4b.safetensors` in `models/diffusion_models`, `qwen_3_4b.safetensors` in `models/text_encoders`, `flux2-vae.safetensors` in `models/vae`. FLUX.2 dev goes in the same way with `mistral_3_small_flux2_bf16.safetensors`, guidance 1 and *FluxGuidance* 4 on *conditioning*, also as `fp8mixed`.

| | here | the model as released |
|---|---|---|
| size | 512 x 512 | 1024 x 1024 (ComfyUI's template) |
| steps | 12, as for FLUX.1 | 20 (ComfyUI's template) |
| guidance | 5 | 5 (ComfyUI's template) |
| noise levels | *Flux2Scheduler*, wired into *sigmas* | the same |""",
    ),
    Example(
        name="12 Train Qwen-Image",
        run="qwen_image_lora",
        loaders=parts(
            "qwen_image_fp8_e4m3fn.safetensors",
            one_encoder("qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image"),
            "qwen_image_vae.safetensors",
        ),
        **SEPARATE,
        size=(512, 512, 1),
        steps=12,
        preset="one-gpu-qwen-image",
        patch=("ModelSamplingAuraFlow", {"shift": 3.1}),
        says="""`qwen_image_fp8_e4m3fn.safetensors` (20 GB) in `models/diffusion_models`, `qwen_2.5_vl_7b_fp8_scaled.safetensors` in `models/text_encoders`, `qwen_image_vae.safetensors` in `models/vae`.

| | here | the model as released |
|---|---|---|
| size | 512 x 512; multiples of 32 | 1328 x 1328 |
| steps | 12 | 50 (model card), 20 (ComfyUI's template without its Lightning LoRA) |
| guidance | none, as the reference trains | 4 (model card), 2.5 (ComfyUI) |
| shift | 3.1 | 3.1 (ComfyUI's template) |""",
    ),
    Example(
        name="13 Train Z-Image",
        run="z_image_lora",
        loaders=parts("z_image_bf16.safetensors", one_encoder("qwen_3_4b.safetensors", "lumina2"), "ae.safetensors"),
        **SEPARATE,
        size=(512, 512, 1),
        steps=12,
        preset="one-gpu-flux",
        overrides=("rollout.guidance_scale=4", "objective.updates=1", "rollout.batch_size=6", "objective.batch_size=2"),
        guidance=4.0,
        patch=("ModelSamplingAuraFlow", {"shift": 3.0}),
        says="""`z_image_bf16.safetensors` (the base, not the turbo) in `models/diffusion_models`, `qwen_3_4b.safetensors` in `models/text_encoders`, `ae.safetensors` in `models/vae`.

| | here | the model as released |
|---|---|---|
| size | 512 x 512 | 1024 x 1024 (ComfyUI's template) |
| steps | 12 | 25 (ComfyUI's template) |
| guidance | 4 | 4 (ComfyUI's template) |
| shift | 3 | 3 (ComfyUI's template) |

For `z_image_turbo_bf16.safetensors`: 8 steps, and guidance 1 in the overrides and in the guider.""",
    ),
    Example(
        name="14 Train Wan 2.1 T2V",
        run="wan_t2v_lora",
        loaders=parts(
            "wan2.1_t2v_1.3B_fp16.safetensors",
            one_encoder("umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan"),
            "wan_2.1_vae.safetensors",
        ),
        **SEPARATE,
        size=(416, 240, 33),
        steps=12,
        preset="one-gpu-wan21",
        guidance=5.0,
        patch=("ModelSamplingSD3", {"shift": 8.0}),
        latent="EmptyHunyuanLatentVideo",
        negative=WAN_NEGATIVE,
        says="""`wan2.1_t2v_1.3B_fp16.safetensors` in `models/diffusion_models`, `umt5_xxl_fp8_e4m3fn_scaled.safetensors` in `models/text_encoders`, `wan_2.1_vae.safetensors` in `models/vae`.

| | here | the model as released |
|---|---|---|
| size, frames | 416 x 240, 33 (Flow-GRPO's) | 832 x 480, 81 (33 in ComfyUI's template) at 16 a second |
| steps | 12 | 50 (model card), 30 (ComfyUI's template) |
| guidance | 5, the reference's | 6 (ComfyUI's template) |
| shift | 8 | 8 (model card and ComfyUI's template) |""",
    ),
    Example(
        name="15 Train Wan 2.1 I2V",
        run="wan_i2v_lora",
        loaders={
            **parts(
                "wan2.1_i2v_480p_14B_fp16.safetensors",
                one_encoder("umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan"),
                "wan_2.1_vae.safetensors",
            ),
            "vision": ("CLIPVisionLoader", {"clip_name": "clip_vision_h.safetensors"}),
        },
        **SEPARATE,
        size=(416, 240, 33),
        steps=12,
        preset="one-gpu-wan21",
        guidance=5.0,
        patch=("ModelSamplingSD3", {"shift": 8.0}),
        negative=WAN_NEGATIVE,
        first_frame="WanImageToVideo",
        says="""`wan2.1_i2v_480p_14B_fp16.safetensors` (33 GB; *weight_dtype* `fp8_e4m3fn` for half of it) in `models/diffusion_models`, `umt5_xxl_fp8_e4m3fn_scaled.safetensors` in `models/text_encoders`, `wan_2.1_vae.safetensors` in `models/vae`, `clip_vision_h.safetensors` in `models/clip_vision`, and a first frame in `input`. All prompts of a run share that frame, so they say what moves.

| | here | the model as released |
|---|---|---|
| size, frames | 416 x 240, 33 | 832 x 480, 81 at 16 a second |
| steps | 12 | 40 (model card), 20 (ComfyUI's template) |
| guidance | 5, the reference's | 5 (model card), 6 (ComfyUI's template) |
| shift | 8 | 8 (ComfyUI's template), 3 at 480p (model card) |""",
    ),
    Example(
        name="16 Train HunyuanVideo",
        run="hunyuan_video_lora",
        loaders=parts(
            "hunyuan_video_t2v_720p_bf16.safetensors",
            two_encoders("clip_l.safetensors", "llava_llama3_fp8_scaled.safetensors", "hunyuan_video"),
            "hunyuan_video_vae_bf16.safetensors",
        ),
        **SEPARATE,
        size=(480, 320, 17),
        steps=12,
        preset="one-gpu-hunyuanvideo",
        patch=("ModelSamplingSD3", {"shift": 5.0}),
        embedded=6.0,
        latent="EmptyHunyuanLatentVideo",
        fps=24.0,
        says="""`hunyuan_video_t2v_720p_bf16.safetensors` (26 GB; *weight_dtype* `fp8_e4m3fn` for half of it) in `models/diffusion_models`, `clip_l.safetensors` and `llava_llama3_fp8_scaled.safetensors` in `models/text_encoders`, `hunyuan_video_vae_bf16.safetensors` in `models/vae`.

| | here | the model as released |
|---|---|---|
| size, frames | 480 x 320, 17 | 1280 x 720, 129 at 24 a second; 848 x 480, 73 in ComfyUI's template; 480 x 480, 53 in the paper |
| steps | 12 | 50 (model card), 20 (ComfyUI's template), 16 (paper) |
| embedded guidance | 6, by *FluxGuidance* | 6 (model card and ComfyUI's template) |
| shift | 5, the paper's | 7 (model card and ComfyUI's template) |""",
    ),
    Example(
        name="17 Train SkyReels-I2V",
        run="skyreels_lora",
        loaders=parts(
            "skyreels_hunyuan_i2v_bf16.safetensors",
            two_encoders("clip_l.safetensors", "llava_llama3_fp8_scaled.safetensors", "hunyuan_video"),
            "hunyuan_video_vae_bf16.safetensors",
        ),
        **SEPARATE,
        size=(512, 320, 17),
        steps=12,
        preset="one-gpu-skyreels-i2v",
        guidance=5.0,
        patch=("ModelSamplingSD3", {"shift": 7.0}),
        embedded=1.0,
        negative="static, blurred, deformed, low quality",
        first_frame="HunyuanImageToVideo",
        fps=24.0,
        says="""`skyreels_hunyuan_i2v_bf16.safetensors` (26 GB; *weight_dtype* `fp8_e4m3fn` for half of it) in `models/diffusion_models`, `clip_l.safetensors` and `llava_llama3_fp8_scaled.safetensors` in `models/text_encoders`, `hunyuan_video_vae_bf16.safetensors` in `models/vae`, and a first frame in `input`. All prompts of a run share that frame, so they say what moves.

| | here | the model as released |
|---|---|---|
| size, frames | 512 x 320, 17 | 960 x 544, 97 at 24 a second (model card); 640 x 400, 53 in the paper |
| steps | 12 | 30 (model card), 16 (paper) |
| guidance | 5 true and 1 embedded, the paper's | 6 true and 1 embedded (model card) |
| shift | 7, the paper's | 7 (model card) |""",
    ),
    Example(
        name="18 Train LTX-Video",
        run="ltx_video_lora",
        loaders={
            "checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": "ltx-video-2b-v0.9.safetensors"}),
            "encoders": one_encoder("t5xxl_fp16.safetensors", "ltxv"),
        },
        model=("checkpoint", 0),
        clip=("encoders", 0),
        vae=("checkpoint", 2),
        size=(512, 320, 33),
        steps=12,
        preset="one-gpu-wan21",
        overrides=("rollout.guidance_scale=3",),
        guidance=3.0,
        scheduler=(
            "LTXVScheduler",
            {"steps": 12, "max_shift": 2.05, "base_shift": 0.95, "stretch": True, "terminal": 0.1},
        ),
        latent="EmptyLTXVLatentVideo",
        negative="low quality, worst quality, deformed, distorted, disfigured, motion smear, motion artifacts",
        fps=25.0,
        says="""`ltx-video-2b-v0.9.safetensors` (network and VAE) in `models/checkpoints`, `t5xxl_fp16.safetensors` in `models/text_encoders`.

| | here | the model as released |
|---|---|---|
| size, frames | 512 x 320, 33; multiples of 32, and 1 more than a multiple of 8 | 768 x 512, 97 at 25 a second (ComfyUI's template) |
| steps | 12 | 30 (ComfyUI's template) |
| guidance | 3 | 3 (ComfyUI's template) |
| noise levels | *LTXVScheduler* 2.05, 0.95, stretched to 0.1, wired into *sigmas* | the same |
| frame rate | 25, by *LTXVConditioning* | 25 |""",
    ),
)


# ---------------------------------------------------------------------------------------------------- the API graph


class Graph:
    """Nodes in API format, by number, with the column each stands in."""

    def __init__(self, info: dict) -> None:
        self.info, self.nodes, self.columns = info, {}, {}

    def add(self, column: int, class_type: str, title: str = "", **inputs: object) -> str:
        """Add a node; widgets that are not given are at their defaults. Its number."""
        key = str(len(self.nodes) + 1)
        node = {"class_type": class_type, "inputs": inputs}
        for name, kind, options in widgets(self.info[class_type], inputs):
            if name not in inputs:
                inputs[name] = default(kind, options)
        node["_meta"] = {"title": title or self.info[class_type]["display_name"]}
        self.nodes[key], self.columns[key] = node, column
        return key


def widgets(description: dict, values: dict) -> list[tuple[str, object, dict]]:
    """Name, type and options of a node's widgets, in the interface's order; a choice's own follow it."""
    return _widgets(description["input"], description["input_order"], values, "")


def _widgets(inputs: dict, order: dict | None, values: dict, prefix: str) -> list[tuple[str, object, dict]]:
    found = []
    for section in ("required", "optional"):
        entries = inputs.get(section, {})
        for name in (order or {}).get(section, entries):
            kind, *rest = entries[name]
            options = rest[0] if rest else {}
            if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
                continue
            found.append((prefix + name, kind, options))
            if kind == "COMFY_DYNAMICCOMBO_V3":
                chosen = values.get(name, options["options"][0]["key"])
                (option,) = [option for option in options["options"] if option["key"] == chosen]
                found += _widgets(option["inputs"], None, values, f"{prefix}{name}.")
    return found


def default(kind: object, options: dict) -> object:
    if "default" in options:
        return options["default"]
    if kind == "COMFY_DYNAMICCOMBO_V3":
        return options["options"][0]["key"]
    choices = kind if isinstance(kind, list) else options.get("options")
    return choices[0] if choices else {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(kind, "")


def api_graph(example: Example, info: dict) -> Graph:
    """Loaders, base model, training, and the LoRA at work."""
    graph = Graph(info)
    width, height, frames = example.size
    loaded = {name: graph.add(0, kind, **inputs) for name, (kind, inputs) in example.loaders.items()}
    model, clip, vae = ([loaded[name], output] for name, output in (example.model, example.clip, example.vae))
    if example.patch:
        kind, inputs = example.patch
        model = [graph.add(0, kind, model=model, **inputs), 0]
    sigmas = _sigmas(graph, 1, example, model) if isinstance(example.scheduler, tuple) else None

    base = graph.add(
        1,
        "DanceGRPO_BaseModel",
        folder="(none in models/diffusers)",
        model=model,
        vae=vae,
        width=width,
        height=height,
        frames=frames,
        gradient_checkpointing=example.checkpointing,
        **({"scheduler": example.scheduler} if sigmas is None else {"sigmas": sigmas}),
    )
    settings = graph.add(
        1,
        "DanceGRPO_Preset",
        preset=example.preset,
        overrides="\n".join(("runtime.iterations=200", *example.overrides)),
    )
    reward = _reward(graph, example.is_video)
    texts = (PROMPTS, HELD_OUT) if not example.is_video else (MOVING, MOVING_HELD_OUT)
    texts = (FROM_FRAME, FROM_FRAME_HELD_OUT) if example.first_frame else texts
    train_texts = graph.add(2, "PrimitiveStringMultiline", "Training prompts", value=texts[0])
    held_out = graph.add(2, "PrimitiveStringMultiline", "Held-out prompts", value=texts[1])
    shown = graph.add(2, "PrimitiveStringMultiline", "Prompt of the picture", value=texts[1].splitlines()[0])
    positive, negative, latent = _conditions(graph, example, loaded, clip, vae, [shown, 0])
    carried = {"conditioning": positive} if example.embedded or example.first_frame or example.fps == 25 else {}
    train = graph.add(
        3,
        "DanceGRPO_TrainLoRA",
        grpo_model=[base, 0],
        reward=[reward, 0],
        clip=clip,
        settings=[settings, 0],
        name=example.run,
        prompts=[train_texts, 0],
        held_out_prompts=[held_out, 0],
        negative=example.negative,
        **carried,
    )
    graph.add(3, "PreviewAny", "Name in the LoRA loaders", source=[train, 2])
    graph.add(3, "SaveImage", "Reward curve", images=[train, 4], filename_prefix=f"dancegrpo/{example.run}_curve")

    learned = [graph.add(5, "LoraModelLoader", model=model, lora=[train, 0], strength_model=1.0, bypass=False), 0]
    levels = sigmas or _sigmas(graph, 5, example, learned)
    kernel, eta = example.kernel
    noise = graph.add(5, "DanceGRPO_GroupNoise", noise_seed=1)
    sampler = graph.add(5, "DanceGRPO_SDESampler", kernel=kernel, eta=eta)
    if example.guidance == 1:
        guider = graph.add(5, "BasicGuider", model=learned, conditioning=positive)
    else:
        guider = graph.add(5, "CFGGuider", model=learned, positive=positive, negative=negative, cfg=example.guidance)
    sample = graph.add(
        6,
        "SamplerCustomAdvanced",
        noise=[noise, 0],
        guider=[guider, 0],
        sampler=[sampler, 0],
        sigmas=levels,
        latent_image=latent,
    )
    images = [graph.add(6, "VAEDecode", samples=[sample, 0], vae=vae), 0]
    if example.is_video:
        video = graph.add(6, "CreateVideo", images=images, fps=example.fps)
        graph.add(6, "SaveVideo", video=[video, 0], filename_prefix=f"dancegrpo/{example.run}")
    else:
        graph.add(6, "SaveImage", "With the LoRA", images=images, filename_prefix=f"dancegrpo/{example.run}")
    batch, title = ("one video", "Score Video") if example.is_video else ("images", "Score Images")
    score = graph.add(
        7, "DanceGRPO_ScoreImages", title, reward=[reward, 0], images=images, prompt=[shown, 0], batch=batch
    )
    graph.add(7, "PreviewAny", "Numbers", source=[score, 2])
    return graph


def _sigmas(graph: Graph, column: int, example: Example, model: list) -> list:
    if isinstance(example.scheduler, tuple):
        kind, inputs = example.scheduler
        return [graph.add(column, kind, **inputs), 0]
    return [graph.add(column, "BasicScheduler", model=model, scheduler=example.scheduler, steps=example.steps), 0]


def _reward(graph: Graph, is_video: bool) -> str:
    if is_video:
        # Text alignment is left out, as in the paper.
        return graph.add(1, "DanceGRPO_LoadReward", reward="videoalign", **{"reward.text": 0.0})
    preferred = graph.add(1, "DanceGRPO_LoadReward", reward="hps-v2.1")
    fitting = graph.add(1, "DanceGRPO_LoadReward", reward="clip")
    return graph.add(
        1, "DanceGRPO_CombineRewards", reward_1=[preferred, 0], reward_2=[fitting, 0], weight_1=0.7, weight_2=1.4
    )


def _conditions(
    graph: Graph, example: Example, loaded: dict[str, str], clip: list, vae: list, text: list
) -> tuple[list, list | None, list]:
    """Positive, negative (where there is guidance) and latent."""
    width, height, frames = example.size
    positive = [graph.add(4, "CLIPTextEncode", "Positive", clip=clip, text=text), 0]
    negative = None
    if example.guidance != 1:
        negative = [graph.add(4, "CLIPTextEncode", "Negative", clip=clip, text=example.negative), 0]
    if example.embedded is not None:
        positive = [graph.add(4, "FluxGuidance", conditioning=positive, guidance=example.embedded), 0]
        if negative is not None:
            negative = [
                graph.add(
                    4, "FluxGuidance", "FluxGuidance (negative)", conditioning=negative, guidance=example.embedded
                ),
                0,
            ]
    size = {"width": width, "height": height, "batch_size": 1 if example.is_video else 4}
    if example.first_frame:
        return _first_frame(graph, example, loaded, vae, positive, negative, size | {"length": frames})
    if example.latent == "EmptyLTXVLatentVideo":
        rate = graph.add(4, "LTXVConditioning", positive=positive, negative=negative, frame_rate=example.fps)
        positive, negative = [rate, 0], [rate, 1]
    length = {"length": frames} if example.is_video else {}
    return positive, negative, [graph.add(4, example.latent, **size, **length), 0]


def _first_frame(
    graph: Graph, example: Example, loaded: dict[str, str], vae: list, positive: list, negative: list, size: dict
) -> tuple[list, list, list]:
    image = [graph.add(0, "LoadImage", "First frame", image="example.png"), 0]
    if example.first_frame == "WanImageToVideo":
        seen = graph.add(0, "CLIPVisionEncode", clip_vision=[loaded["vision"], 0], image=image, crop="none")
        node = graph.add(
            4,
            "WanImageToVideo",
            positive=positive,
            negative=negative,
            vae=vae,
            clip_vision_output=[seen, 0],
            start_image=image,
            **size,
        )
        return [node, 0], [node, 1], [node, 2]
    add = lambda title, text: graph.add(  # noqa: E731
        4, example.first_frame, title, positive=text, vae=vae, start_image=image, guidance_type="v1 (concat)", **size
    )
    first, second = add("First frame", positive), add("First frame (negative)", negative)
    return [first, 0], [second, 0], [first, 1]


# --------------------------------------------------------------------------------------------- the interface's graph


def interface_graph(example: Example, graph: Graph) -> dict:
    """The same as the interface saves it, in columns from left to right."""
    left = [sum(WIDTHS[:i]) + i * 70 for i in range(len(WIDTHS))]
    nodes, links, feet = placed(graph, left, WIDTHS, [0] * len(WIDTHS))
    nodes.append(_note(example, len(nodes) + 1, max(feet[:2])))
    return document(nodes, links, [], 0.5)


def voting_graph(name: str, graph: Graph) -> dict:
    """A graph of `voting_workflows`: its note at the top left, and a titled group around each of its parts."""
    widths, tops, gap = voting_workflows.WIDTHS, voting_workflows.TOPS, 60
    left = [sum(widths[:i]) + i * gap for i in range(len(widths))]
    nodes, links, feet = placed(graph, left, widths, list(tops))
    groups = []
    for number, (title, first, last) in enumerate(voting_workflows.GROUPS, 1):
        top, foot = min(tops[first : last + 1]), max(feet[first : last + 1])
        box = [left[first] - 20, top - 90, left[last] + widths[last] - left[first] + 40, foot - top + 60]
        groups.append({"id": number, "title": title, "bounding": box, "color": "#3f789e", "font_size": 24, "flags": {}})
    note = note_node(len(nodes) + 1, [0, 0], [widths[0], 680], voting_workflows.NOTES[name])
    return document([*nodes, note], links, groups, 0.75, [110, 190])


def placed(graph: Graph, left: list[int], widths: tuple[int, ...], feet: list[int]) -> tuple[list, list, list[int]]:
    """Nodes and links as the interface saves them, the nodes of a column below each other; and where columns end.

    Args:
        left, widths: of the columns.
        feet: where each column begins.
    """
    links, nodes = [], []
    outgoing: dict[tuple[str, int], list[int]] = {}
    for key, node in graph.nodes.items():
        description, column = graph.info[node["class_type"]], graph.columns[key]
        slots, shown = _slots(description, node["inputs"]), widgets(description, node["inputs"])
        for index, slot in enumerate(slots):
            source = node["inputs"].get(slot["name"])
            if isinstance(source, list):
                slot["link"] = len(links) + 1
                links.append([slot["link"], int(source[0]), source[1], int(key), index, slot["type"]])
                outgoing.setdefault((source[0], source[1]), []).append(slot["link"])
        size = [widths[column], _height(description, slots, shown)]
        nodes.append(
            {
                "id": int(key),
                "type": node["class_type"],
                "pos": [left[column], feet[column]],
                "size": size,
                "flags": {},
                "order": int(key) - 1,
                "mode": 0,
                "inputs": slots,
                "outputs": [],
                "properties": {
                    "Node name for S&R": node["class_type"],
                    "cnr_id": "dancegrpo" if node["class_type"].startswith("DanceGRPO") else "comfy-core",
                },
                "widgets_values": _values(shown, node["inputs"]),
                **({"title": node["_meta"]["title"]} if node["_meta"]["title"] != description["display_name"] else {}),
            }
        )
        feet[column] += size[1] + TITLE + GAP
    for node, (key, api) in zip(nodes, graph.nodes.items(), strict=True):
        description = graph.info[api["class_type"]]
        names = zip(description["output_name"], description["output"], strict=True)
        node["outputs"] = [
            {"name": name, "type": kind, "links": outgoing.get((key, slot)), "slot_index": slot}
            for slot, (name, kind) in enumerate(names)
        ]
    # A link's type is that of where it comes from.
    sources = {(node["id"], slot): output["type"] for node in nodes for slot, output in enumerate(node["outputs"])}
    links = [[*link[:5], sources[link[1], link[2]]] for link in links]
    return nodes, links, feet


def document(nodes: list, links: list, groups: list, scale: float, offset: tuple[int, int] = (60, 60)) -> dict:
    """The file that the interface saves, and what it shows of the graph at first."""
    return {
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {"ds": {"scale": scale, "offset": list(offset)}},
        "version": 0.4,
    }


def _slots(description: dict, values: dict) -> list[dict]:
    """Sockets, and widgets that a link fills, in the order of the description."""
    found = []
    for section in ("required", "optional"):
        for name in description["input_order"].get(section, []):
            kind, *rest = description["input"][section][name]
            is_widget = (isinstance(kind, list) or kind in WIDGETS) and not (rest and rest[0].get("forceInput"))
            if not is_widget:
                found.append({"name": name, "type": kind, "link": None})
            elif isinstance(values.get(name), list):
                found.append({"name": name, "type": kind, "link": None, "widget": {"name": name}})
    return found


def _values(shown: list[tuple[str, object, dict]], inputs: dict) -> list:
    values = []
    for name, kind, options in shown:
        value = inputs[name]
        values.append(default(kind, options) if isinstance(value, list) else value)
        if control := options.get("control_after_generate"):
            values.append(control if isinstance(control, str) else "fixed")
        if options.get("image_upload") or options.get("video_upload"):
            values.append("image")
    return values


def _height(description: dict, slots: list[dict], shown: list[tuple[str, object, dict]]) -> int:
    """Enough for sockets, widgets, boxes of text, and what the node shows when it has run."""
    sockets = max(sum("widget" not in slot for slot in slots), len(description["output"]))
    visible = [options for _, _, options in shown if not options.get("advanced")]
    boxes = [name for name, _, options in shown if options.get("multiline") and not options.get("advanced")]
    linked = [slot["name"] for slot in slots if slot["name"] in boxes]
    controls = sum(bool(options.get("control_after_generate")) for options in visible)
    result = {"DanceGRPO_TrainLoRA": 300, "DanceGRPO_ScoreImages": 300, "PreviewAny": 110, "LoadImage": 260}
    result |= {"SaveImage": 300, "SaveVideo": 300, "DanceGRPO_CompareLoRAs": 300}
    extra = result.get(description["name"], 0)
    texts = TEXT_BOX * (len(boxes) - len(linked)) + LINKED_BOX * len(linked)
    return 50 + SLOT * sockets + WIDGET * (len(visible) - len(boxes) + controls) + texts + extra


def _note(example: Example, number: int, top: int) -> dict:
    text = f"""# {example.name.split(" ", 1)[1]}

Core's loaders -> *GRPO Base Model* -> *GRPO Train LoRA* -> core's *Load LoRA Model* -> *SDE Sampler* -> score. Queue it: training runs in a process of its own, the LoRA is then used in this graph and is a file in `output/loras/dancegrpo`.

**For a real model:** {example.says}

**Rewards** go into `models/rewards` under the names on *Load Reward*; `docs/rewards.md` of this pack says where they are from. **Prompts**: these are a beginning; write some hundreds of your own. **Settings** are the preset's with the lines below it; *height*, *width*, *frames* and the noise levels are on the left. Another number of steps has to be changed in the overrides (`rollout.steps=...`) and on the scheduler.

The settings are starting points: they were checked against the nodes, and never run on the released weights. The picture in the template browser shows this graph, for want of weights."""
    return note_node(number, [0, top], [sum(WIDTHS[:2]) + 70, 600], text)


def note_node(number: int, pos: list[int], size: list[int], text: str) -> dict:
    """A note as the interface saves it."""
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": pos,
        "size": size,
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "Read me",
        "properties": {},
        "widgets_values": [text],
    }


def files(info: dict) -> dict[str, str]:
    """Path below `workflows` and content of every file.

    Args:
        info: what ComfyUI's /object_info gives.
    """
    written = {}
    for name, graph, layout in graphs(info):
        for folder, data in (("", interface_graph(graph, layout)), ("api/", graph.nodes)):
            written[f"{folder}{name}.json"] = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    return written


def main(address: str) -> None:
    with urllib.request.urlopen(f"{address}/object_info") as answer:
        info = json.load(answer)
    for path, text in files(info).items():
        (FOLDER / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
