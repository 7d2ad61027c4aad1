"""Writes the example workflows of released models, for the interface and for the API.

    python workflows/build.py http://127.0.0.1:8188

asks a running ComfyUI, with this pack, what its nodes look like, and writes the graphs beside this file. A model is one
entry of MODELS; all of them share one graph: loaders, training, the LoRA in the same graph, sampling, scores.
"""

import json
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
Ref = tuple["Node", int]
"""An output of a node."""


@dataclass(eq=False)
class Node:
    """A node of a graph: its class, what is typed or wired into it, and the column it stands in."""

    class_type: str
    column: int
    inputs: dict[str, object]
    title: str | None = None
    height: int = 0


@dataclass
class Graph:
    nodes: list[Node] = field(default_factory=list)

    def add(self, column: int, class_type: str, title: str | None = None, height: int = 0, /, **inputs: object) -> Node:
        """
        Args:
            height: in pixels, where the node grows with what it shows.
            inputs: values of widgets, and `Ref`s.
        """
        self.nodes.append(Node(class_type, column, inputs, title, height))
        return self.nodes[-1]


# ---------------------------------------------------------------------------------------------------------- the models

IMAGE_PROMPTS = """a red fox asleep on a mossy log, soft morning light
a lighthouse on a cliff during a storm, oil painting
two cups of coffee on a wooden table beside a window
a portrait of an old fisherman with a grey beard
a blue bicycle leaning against a yellow wall
a city street at night in the rain, neon reflections
a bowl of ramen with a soft-boiled egg, top view
a snowy mountain village seen from above
an astronaut riding a horse across a desert
a green parrot to the left of a brass lamp
three white candles in front of a mirror
a greenhouse full of tropical plants
a wooden sailing ship in calm turquoise water
a cat in a knight's armour, studio photograph
a loaf of bread and a knife on a linen cloth
a child flying a kite on a windy beach
a watercolour of a fishing harbour
a black dog running through autumn leaves
a robot watering flowers in a garden
an old library with tall windows and dust in the light
a glass of lemonade with ice on a hot day
a steam train crossing a stone bridge
a field of sunflowers under a cloudy sky
a small red house beside a frozen lake"""
IMAGE_HELD_OUT = """a white rabbit in a field of poppies
a stone bridge over a river in autumn, oil painting
a purple teapot on a stack of books
a market street in the morning, people with umbrellas"""
VIDEO_PROMPTS = """a fox runs through deep snow, the camera follows it
waves break on black rocks at sunset
a woman pours tea into a white cup
a steam train crosses a stone bridge
a paper boat drifts down a small stream
a cat jumps from a sofa onto a carpet
fireworks over a city at night
a potter shapes a bowl on a turning wheel
rain falls on a window, cars pass outside
a horse gallops along a beach
smoke rises from a camp fire in a forest
a child blows soap bubbles in a garden"""
VIDEO_HELD_OUT = """a dog shakes water off its coat
clouds drift over a mountain lake"""
MOVING_PROMPTS = """the camera moves slowly forward
the camera circles slowly around the subject
wind moves the scene gently
the light changes from day to evening
the subject turns its head to the left
the subject walks towards the camera
it begins to rain
the camera rises and looks down"""
MOVING_HELD_OUT = """the camera moves slowly backward
the subject looks up and smiles"""


@dataclass(frozen=True)
class Model:
    """A released model: how core loads it, and how it is sampled and trained.

    Attributes:
        name: of the workflow, with its number.
        load: adds the loaders and returns MODEL, CLIP and VAE.
        size: width, height, frames (1 is an image).
        latent: class of the node that makes an empty latent.
        steps: of sampling and training.
        cfg: true guidance, 1 where the model takes none.
        preset: of GRPO Preset, which holds the settings of one GPU.
        files: file and folder of each file.
        notes: what the released model is sampled with, and from where that is known.
        guidance: embedded guidance, of models that take it.
        kernel, eta: of the SDE sampler.
        scheduler: as in KSampler.
        levels: adds a node that gives SIGMAS, in place of the scheduler.
        negative: negative prompt.
        condition: adds nodes that put more than text into both conditions, and returns them.
        from_picture: whether a video begins with a picture.
        fps: of saved videos.
    """

    name: str
    load: Callable[[Graph], tuple[Ref, Ref, Ref]]
    size: tuple[int, int, int]
    latent: str
    steps: int
    cfg: float
    preset: str
    files: dict[str, str]
    notes: str
    guidance: float | None = None
    kernel: str = "dance-exact"
    eta: float = 0.5
    scheduler: str = "simple"
    levels: Callable[[Graph, Ref, "Model"], Ref] | None = None
    negative: str = ""
    condition: Callable[[Graph, Ref, Ref, Ref, "Model"], tuple[Ref, Ref]] | None = None
    from_picture: bool = False
    fps: float = 16.0

    @property
    def is_video(self) -> bool:
        return self.size[2] > 1

    @property
    def run(self) -> str:
        """A name for run and LoRA."""
        return "".join(c if c.isalnum() else "_" for c in self.name.split(" ", 1)[1].lower())


def checkpoint(file: str) -> Callable[[Graph], tuple[Ref, Ref, Ref]]:
    def load(graph: Graph) -> tuple[Ref, Ref, Ref]:
        node = graph.add(0, "CheckpointLoaderSimple", ckpt_name=file)
        return (node, 0), (node, 1), (node, 2)

    return load


def separate(
    network: str, vae: str, clip: dict[str, str], shift: tuple[str, float] | None = None
) -> Callable[[Graph], tuple[Ref, Ref, Ref]]:
    """Load Diffusion Model, Load VAE, and Load CLIP with one or two files.

    Args:
        clip: inputs of the CLIP loader.
        shift: class of a ModelSampling node, and its shift.
    """

    def load(graph: Graph) -> tuple[Ref, Ref, Ref]:
        model = (graph.add(0, "UNETLoader", unet_name=network, weight_dtype="default"), 0)
        if shift:
            model = (graph.add(0, shift[0], model=model, shift=shift[1]), 0)
        loader = "DualCLIPLoader" if "clip_name1" in clip else "CLIPLoader"
        return model, (graph.add(0, loader, **clip), 0), (graph.add(0, "VAELoader", vae_name=vae), 0)

    return load


def ltx(graph: Graph) -> tuple[Ref, Ref, Ref]:
    node = graph.add(0, "CheckpointLoaderSimple", ckpt_name="ltx-video-2b-v0.9.5.safetensors")
    clip = graph.add(0, "CLIPLoader", clip_name="t5xxl_fp16.safetensors", type="ltxv")
    return (node, 0), (clip, 0), (node, 2)


def flux2_levels(graph: Graph, latent: Ref, model: Model) -> Ref:
    width, height, _ = model.size
    return (graph.add(0, "Flux2Scheduler", steps=model.steps, width=width, height=height), 0)


def ltx_levels(graph: Graph, latent: Ref, model: Model) -> Ref:
    return (graph.add(0, "LTXVScheduler", steps=model.steps, latent=latent), 0)


def ltx_frame_rate(graph: Graph, positive: Ref, negative: Ref, vae: Ref, model: Model) -> tuple[Ref, Ref]:
    node = graph.add(4, "LTXVConditioning", positive=positive, negative=negative, frame_rate=model.fps)
    return (node, 0), (node, 1)


def wan_frame(graph: Graph, positive: Ref, negative: Ref, vae: Ref, model: Model) -> tuple[Ref, Ref]:
    picture = first_frame(graph)
    vision = graph.add(0, "CLIPVisionLoader", clip_name="clip_vision_h.safetensors")
    seen = graph.add(0, "CLIPVisionEncode", clip_vision=(vision, 0), image=picture, crop="none")
    width, height, frames = model.size
    node = graph.add(
        4, "WanImageToVideo", positive=positive, negative=negative, vae=vae, width=width, height=height, length=frames,
        clip_vision_output=(seen, 0), start_image=picture,
    )  # fmt: skip
    return (node, 0), (node, 1)


def skyreels_frame(graph: Graph, positive: Ref, negative: Ref, vae: Ref, model: Model) -> tuple[Ref, Ref]:
    width, height, _ = model.size
    scaled = graph.add(
        0, "ImageScale", image=first_frame(graph), upscale_method="lanczos", width=width, height=height, crop="center"
    )
    node = graph.add(
        4, "InstructPixToPixConditioning", positive=positive, negative=negative, vae=vae, pixels=(scaled, 0)
    )
    return (node, 0), (node, 1)


def first_frame(graph: Graph) -> Ref:
    return (graph.add(0, "LoadImage", "First frame", 380, image="example.png"), 0)


WAN_CLIP = {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan"}
WAN_FILES = {WAN_CLIP["clip_name"]: "text_encoders", "wan_2.1_vae.safetensors": "vae"}
WAN_NEGATIVE = "overexposed, static, blurred details, subtitles, worst quality, low quality, deformed, still picture"
HUNYUAN_CLIP = {
    "clip_name1": "clip_l.safetensors",
    "clip_name2": "llava_llama3_fp8_scaled.safetensors",
    "type": "hunyuan_video",
}
HUNYUAN_FILES = {
    "clip_l.safetensors": "text_encoders",
    "llava_llama3_fp8_scaled.safetensors": "text_encoders",
    "hunyuan_video_vae_bf16.safetensors": "vae",
}
MODELS = [
    Model(
        "7 SD1.5",
        checkpoint("v1-5-pruned-emaonly-fp16.safetensors"),
        (512, 512, 1),
        "EmptyLatentImage",
        20,
        5.0,
        "one-gpu-sd14",
        {"v1-5-pruned-emaonly-fp16.safetensors": "checkpoints"},
        "512 x 512, 20 steps (core's template); guidance 5 is the paper's for Stable Diffusion 1.4. The model predicts "
        "noise, so the kernel is `ddim`, with eta from 0 to 1.",
        kernel="ddim",
        eta=1.0,
        scheduler="normal",
    ),
    Model(
        "8 SDXL",
        checkpoint("sd_xl_base_1.0.safetensors"),
        (1024, 1024, 1),
        "EmptyLatentImage",
        25,
        5.0,
        "one-gpu-sd14",
        {"sd_xl_base_1.0.safetensors": "checkpoints"},
        "1024 x 1024, 25 steps, `normal` (core's template); guidance 5 instead of its 8, as the paper takes for Stable "
        "Diffusion. The model predicts noise, so the kernel is `ddim`, with eta from 0 to 1. 768 x 768 trains in half "
        "the time.",
        kernel="ddim",
        eta=1.0,
        scheduler="normal",
    ),
    Model(
        "9 SD3.5",
        checkpoint("sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors"),
        (512, 512, 1),
        "EmptySD3LatentImage",
        20,
        4.0,
        "one-gpu-flux",
        {"sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors": "checkpoints"},
        "20 steps, guidance 4 (core's template, with `sgm_uniform`); the shift of 3 comes with the model. It was made "
        "for 1024 x 1024; training at 512 x 512 takes a quarter of the time, as Flow-GRPO does.",
        scheduler="sgm_uniform",
    ),
    Model(
        "10 FLUX.1",
        separate(
            "flux1-dev.safetensors",
            "ae.safetensors",
            {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors", "type": "flux"},
        ),
        (720, 720, 1),
        "EmptySD3LatentImage",
        16,
        1.0,
        "one-gpu-flux",
        {
            "flux1-dev.safetensors": "diffusion_models",
            "clip_l.safetensors": "text_encoders",
            "t5xxl_fp16.safetensors": "text_encoders",
            "ae.safetensors": "vae",
        },
        "720 x 720 and 16 steps are the paper's; embedded guidance 3.5 is core's. The paper shifts the noise levels by "
        "3: a *ModelSamplingSD3* node with shift 3 behind the loader does that; without it the model's own levels are "
        "used. With 24 GB choose `fp8_e4m3fn` in *Load Diffusion Model*.",
        guidance=3.5,
    ),
    Model(
        "11 FLUX.2",
        separate(
            "flux2_dev_fp8mixed.safetensors",
            "flux2-vae.safetensors",
            {"clip_name": "mistral_3_small_flux2_bf16.safetensors", "type": "flux2"},
        ),
        (768, 768, 1),
        "EmptyFlux2LatentImage",
        20,
        1.0,
        "one-gpu-flux",
        {
            "flux2_dev_fp8mixed.safetensors": "diffusion_models",
            "mistral_3_small_flux2_bf16.safetensors": "text_encoders",
            "flux2-vae.safetensors": "vae",
        },
        "20 steps, embedded guidance 4, levels of *Flux2Scheduler* (core's template), which are wired into the "
        "training as well: **its steps must be those of the settings**. 32 billion weights: for large cards.",
        guidance=4.0,
        levels=flux2_levels,
    ),
    Model(
        "12 Qwen-Image",
        separate(
            "qwen_image_fp8_e4m3fn.safetensors",
            "qwen_image_vae.safetensors",
            {"clip_name": "qwen_2.5_vl_7b_fp8_scaled.safetensors", "type": "qwen_image"},
            ("ModelSamplingAuraFlow", 3.1),
        ),
        (512, 512, 1),
        "EmptySD3LatentImage",
        20,
        4.0,
        "one-gpu-qwen-image",
        {
            "qwen_image_fp8_e4m3fn.safetensors": "diffusion_models",
            "qwen_2.5_vl_7b_fp8_scaled.safetensors": "text_encoders",
            "qwen_image_vae.safetensors": "vae",
        },
        "20 steps, guidance 4, shift 3.1 (core's template). It was made for 1328 x 1328; 512 x 512 is the size that "
        "the reference trains at. 20 billion weights in fp8 take 20 GB.",
    ),
    Model(
        "13 Z-Image",
        separate(
            "z_image_bf16.safetensors",
            "ae.safetensors",
            {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"},
            ("ModelSamplingAuraFlow", 3.0),
        ),
        (768, 768, 1),
        "EmptySD3LatentImage",
        25,
        4.0,
        "one-gpu-flux",
        {
            "z_image_bf16.safetensors": "diffusion_models",
            "qwen_3_4b.safetensors": "text_encoders",
            "ae.safetensors": "vae",
        },
        "25 steps, guidance 4, shift 3 (core's template). 6 billion weights: 12 GB in bf16, half of it as "
        "`fp8_e4m3fn` in *Load Diffusion Model*. Z-Image Turbo trains too, with 8 steps and guidance 1, but loses what "
        "makes it fast the longer it is trained.",
    ),
    Model(
        "14 Wan 2.1 T2V",
        separate("wan2.1_t2v_1.3B_fp16.safetensors", "wan_2.1_vae.safetensors", WAN_CLIP, ("ModelSamplingSD3", 8.0)),
        (416, 240, 33),
        "EmptyHunyuanLatentVideo",
        20,
        5.0,
        "one-gpu-wan21",
        {"wan2.1_t2v_1.3B_fp16.safetensors": "diffusion_models", **WAN_FILES},
        "The released model makes 832 x 480 in 30 steps at guidance 6 and shift 8 (core's template). 416 x 240 and 33 "
        "frames are what Flow-GRPO trains at, with guidance 5.",
        negative=WAN_NEGATIVE,
    ),
    Model(
        "15 Wan 2.1 I2V",
        separate(
            "wan2.1_i2v_480p_14B_fp16.safetensors", "wan_2.1_vae.safetensors", WAN_CLIP, ("ModelSamplingSD3", 8.0)
        ),
        (416, 240, 33),
        "EmptyHunyuanLatentVideo",
        20,
        5.0,
        "one-gpu-wan21",
        {
            "wan2.1_i2v_480p_14B_fp16.safetensors": "diffusion_models",
            **WAN_FILES,
            "clip_vision_h.safetensors": "clip_vision",
        },
        "The released model makes 480p in 20 steps at guidance 6 and shift 8 (core's template). 14 billion weights: "
        "choose `fp8_e4m3fn` in *Load Diffusion Model* with 24 GB.",
        negative=WAN_NEGATIVE,
        condition=wan_frame,
        from_picture=True,
    ),
    Model(
        "16 HunyuanVideo",
        separate(
            "hunyuan_video_t2v_720p_bf16.safetensors",
            "hunyuan_video_vae_bf16.safetensors",
            HUNYUAN_CLIP,
            ("ModelSamplingSD3", 7.0),
        ),
        (480, 320, 17),
        "EmptyHunyuanLatentVideo",
        16,
        1.0,
        "one-gpu-hunyuanvideo",
        {"hunyuan_video_t2v_720p_bf16.safetensors": "diffusion_models", **HUNYUAN_FILES},
        "Embedded guidance 6 and shift 7 (core's template); the paper trains at 480 x 480 with 53 frames, 16 steps and "
        "shift 5, on 32 GPUs. 17 frames of 480 x 320 are for one card.",
        guidance=6.0,
        fps=24.0,
    ),
    Model(
        "17 SkyReels-I2V",
        separate(
            "skyreels_hunyuan_i2v_bf16.safetensors",
            "hunyuan_video_vae_bf16.safetensors",
            HUNYUAN_CLIP,
            ("ModelSamplingSD3", 7.0),
        ),
        (512, 320, 17),
        "EmptyHunyuanLatentVideo",
        16,
        5.0,
        "one-gpu-skyreels-i2v",
        {"skyreels_hunyuan_i2v_bf16.safetensors": "diffusion_models", **HUNYUAN_FILES},
        "Guidance 5, embedded guidance 1, shift 7 and 16 steps are the paper's, which trains at 640 x 400 with 53 "
        "frames on 32 GPUs. 17 frames of 512 x 320 are for one card. The first frame goes in as *concat latent* "
        "through core's InstructPixToPixConditioning.",
        guidance=1.0,
        condition=skyreels_frame,
        from_picture=True,
        fps=24.0,
    ),
    Model(
        "18 LTX-Video",
        ltx,
        (512, 320, 33),
        "EmptyLTXVLatentVideo",
        20,
        3.0,
        "one-gpu-wan21",
        {"ltx-video-2b-v0.9.5.safetensors": "checkpoints", "t5xxl_fp16.safetensors": "text_encoders"},
        "The released model makes 768 x 512 with 97 frames in 30 steps at guidance 3, levels of *LTXVScheduler* and 25 "
        "frames a second (core's template); the levels are wired into the training as well: **its steps must be those "
        "of the settings**.",
        levels=ltx_levels,
        negative="low quality, worst quality, deformed, distorted, motion smear",
        condition=ltx_frame_rate,
        fps=25.0,
    ),
]

# ----------------------------------------------------------------------------------------------------------- the graph


def build(model: Model) -> Graph:
    """Loaders -> GRPO Base Model -> GRPO Train LoRA -> Load LoRA Model -> SDE Sampler -> Score Images."""
    graph = Graph()
    width, height, frames = model.size
    network, clip, vae = model.load(graph)
    latent = _empty_latent(graph, model)
    levels = model.levels(graph, latent, model) if model.levels else None
    reward = _rewards(graph, model)
    wired = {} if levels is None else {"sigmas": levels}
    base = graph.add(
        1, "DanceGRPO_BaseModel", model=network, vae=vae, width=width, height=height, frames=frames,
        scheduler=model.scheduler, gradient_checkpointing=True, folder="(none in models/diffusers)", **wired,
    )  # fmt: skip
    overrides = f"rollout.steps={model.steps}\nrollout.guidance_scale={model.cfg:g}"
    settings = graph.add(1, "DanceGRPO_Preset", None, 220, preset=model.preset, overrides=overrides)
    prompts, held_out = _prompts(graph, model)

    text = graph.add(4, "CLIPTextEncode", "Positive: one held-out prompt", 160, clip=clip, text=_shown(model))
    negative = (graph.add(4, "CLIPTextEncode", "Negative", 140, clip=clip, text=model.negative), 0)
    positive = (text, 0)
    if model.guidance is not None:
        positive = (graph.add(4, "FluxGuidance", conditioning=positive, guidance=model.guidance), 0)
    if model.condition:
        positive, negative = model.condition(graph, positive, negative, vae, model)
    carried = {"conditioning": positive} if model.guidance is not None or model.condition else {}
    train = graph.add(
        3, "DanceGRPO_TrainLoRA", None, 1070, grpo_model=(base, 0), reward=reward, clip=clip, settings=(settings, 0),
        name=model.run, prompts=prompts, held_out_prompts=held_out, negative=model.negative, **carried,
    )  # fmt: skip
    trained = (graph.add(5, "LoraModelLoader", model=network, lora=(train, 0)), 0)
    if levels is None:
        levels = (graph.add(5, "BasicScheduler", model=trained, scheduler=model.scheduler, steps=model.steps), 0)
    sample = graph.add(
        5,
        "SamplerCustomAdvanced",
        noise=(graph.add(5, "RandomNoise", noise_seed=1), 0),
        guider=(graph.add(5, "CFGGuider", model=trained, positive=positive, negative=negative, cfg=model.cfg), 0),
        sampler=(
            graph.add(5, "DanceGRPO_SDESampler", kernel=model.kernel, eta=model.eta, end_step=model.steps // 2),
            0,
        ),
        sigmas=levels,
        latent_image=latent,
    )
    images = (graph.add(6, "VAEDecode", samples=(sample, 0), vae=vae), 0)
    batch = "one video" if model.is_video else "images"
    graph.add(6, "DanceGRPO_ScoreImages", None, 640, reward=reward, images=images, prompt=_shown(model), batch=batch)
    _save(graph, model, images)
    graph.add(3, "SaveImage", "Reward curve", 400, images=(train, 4), filename_prefix=f"dancegrpo/{model.run}_curve")
    graph.add(-1, "MarkdownNote", "Read me", 700, text=_note(model))
    return graph


def _empty_latent(graph: Graph, model: Model) -> Ref:
    width, height, frames = model.size
    size = {"width": width, "height": height, "batch_size": 1 if model.is_video else 4}
    if model.is_video:
        size["length"] = frames
    return (graph.add(0, model.latent, **size), 0)


def _rewards(graph: Graph, model: Model) -> Ref:
    if model.is_video:
        return (graph.add(1, "DanceGRPO_LoadReward", reward="videoalign", **{"reward.text": 0.0}), 0)
    hps = graph.add(1, "DanceGRPO_LoadReward", reward="hps-v2.1")
    clip = graph.add(1, "DanceGRPO_LoadReward", reward="clip")
    both = graph.add(1, "DanceGRPO_CombineRewards", reward_1=(hps, 0), reward_2=(clip, 0), weight_1=0.7, weight_2=1.4)
    return (both, 0)


def _prompts(graph: Graph, model: Model) -> tuple[Ref, Ref]:
    pair = (IMAGE_PROMPTS, IMAGE_HELD_OUT)
    if model.is_video:
        pair = (VIDEO_PROMPTS, VIDEO_HELD_OUT)
    if model.from_picture:
        pair = (MOVING_PROMPTS, MOVING_HELD_OUT)
    training = graph.add(2, "PrimitiveStringMultiline", "Training prompts", 500, value=pair[0])
    held_out = graph.add(2, "PrimitiveStringMultiline", "Held-out prompts", 240, value=pair[1])
    return (training, 0), (held_out, 0)


def _shown(model: Model) -> str:
    if not model.is_video:
        return IMAGE_HELD_OUT.splitlines()[0]
    return (MOVING_HELD_OUT if model.from_picture else VIDEO_HELD_OUT).splitlines()[0]


def _save(graph: Graph, model: Model, images: Ref) -> None:
    prefix = f"dancegrpo/{model.run}"
    if model.is_video:
        graph.add(6, "SaveAnimatedWEBP", "With the LoRA", 400, images=images, filename_prefix=prefix, fps=model.fps)
    else:
        graph.add(6, "SaveImage", "With the LoRA", 400, images=images, filename_prefix=prefix)


def _note(model: Model) -> str:
    title = model.name.split(" ", 1)[1]
    files = "\n".join(f"- `models/{folder}/{name}`" for name, folder in model.files.items())
    rewards = (
        "- `models/rewards/videoreward/` for VideoAlign"
        if model.is_video
        else "- `models/rewards/hpsv2/HPS_v2.1_compressed.pt`\n- `models/rewards/clip/DFN5B-CLIP-ViT-H-14-378/`"
    )
    judged = (
        "Videos are judged by VideoAlign's visual and motion quality; text alignment is left out, as in the paper."
        if model.is_video
        else "HPS-v2.1 and CLIP are mixed as 0.7 : 1.4, as the paper's authors advise."
    )
    frame = (
        "\n\nThe first frame and what else the conditioning carries goes with **every** prompt of the run. Choose your "
        "own picture in *First frame*."
        if model.from_picture
        else ""
    )
    return f"""# Train a LoRA for {title} from rewards

The MODEL, CLIP and VAE of this graph's own loaders are trained, by ComfyUI's own code, and the LoRA goes straight \
into *Load LoRA Model*. {judged}{frame}

**For a real model:** this graph is for one. It needs these files, and downloads nothing:

{files}
{rewards}

**Its settings:** {model.notes}

The settings of *GRPO Preset* are a starting point for one card; what its box says wins over the preset. Nothing of \
this was run with released weights yet, and the picture of this template shows the graph, not a result. Prompts of \
your own, at least some dozens, teach more than these."""


# --------------------------------------------------------------------------------------------------------- the formats


WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
"""Types of inputs that are typed or chosen; every other is a socket."""


def widgets(info: dict, node: Node) -> Iterator[tuple[str, object]]:
    """Names and values of a node's widgets in the order of the interface; "" names a control that is no input.

    Args:
        info: of the node's class, as ComfyUI's /object_info gives it.
    """
    for section in ("required", "optional"):
        yield from _widgets(info["input"].get(section, {}), node, "")


def _widgets(inputs: dict, node: Node, prefix: str) -> Iterator[tuple[str, object]]:
    for name, (kind, *rest) in inputs.items():
        options = rest[0] if rest else {}
        full = prefix + name
        if (isinstance(kind, str) and _is_socket(kind)) or options.get("forceInput"):
            continue
        given = node.inputs.get(full)
        wired = isinstance(given, tuple)
        yield full, _default(kind, options) if given is None or wired else given
        if options.get("control_after_generate"):
            yield "", "fixed"
        if kind == "COMFY_DYNAMICCOMBO_V3":
            chosen = next(option for option in options["options"] if option["key"] == given)
            yield from _widgets(chosen["inputs"].get("required", {}), node, f"{full}.")


def _default(kind: object, options: dict) -> object:
    if "default" in options:
        return options["default"]
    if isinstance(kind, list):
        return kind[0]
    if kind == "COMBO":
        return options["options"][0]
    return {"STRING": "", "BOOLEAN": False}.get(kind, 0)


def sockets(info: dict, node: Node) -> Iterator[tuple[str, str]]:
    """Names and types of the inputs that something could be wired into, and of the widgets that something is."""
    for section in ("required", "optional"):
        for name, (kind, *_) in info["input"].get(section, {}).items():
            if isinstance(node.inputs.get(name), tuple) or (isinstance(kind, str) and _is_socket(kind)):
                yield name, kind


def _is_socket(kind: str) -> bool:
    return kind not in WIDGETS


def api(graph: Graph, info: dict) -> dict:
    """What `POST /prompt` takes."""
    numbers = _numbers(graph)
    prompt = {}
    for node, number in numbers.items():
        if node.class_type == "MarkdownNote":
            continue
        values = {name: value for name, value in widgets(info[node.class_type], node) if name}
        wires = {
            name: [str(numbers[value[0]]), value[1]] for name, value in node.inputs.items() if isinstance(value, tuple)
        }
        title = node.title or info[node.class_type]["display_name"] or node.class_type
        prompt[str(number)] = {
            "class_type": node.class_type,
            "inputs": values | wires,
            "_meta": {"title": title},
        }
    return prompt


def _numbers(graph: Graph) -> dict[Node, int]:
    return {node: number for number, node in enumerate(graph.nodes, start=1)}


COLUMNS = {
    -1: (0, 700),
    0: (760, 340),
    1: (1160, 340),
    2: (1560, 400),
    3: (2020, 480),
    4: (2560, 360),
    5: (2980, 320),
    6: (3360, 480),
}
"""Left edge and width of each column."""
TITLE = 70
"""Pixels between two boxes of a column: the lower one's title, and air."""


def interface(graph: Graph, info: dict) -> dict:
    """What the interface loads."""
    numbers, links, nodes = _numbers(graph), [], []
    below = dict.fromkeys(COLUMNS, 0)
    outputs: dict[tuple[Node, int], list[int]] = {}
    for node in graph.nodes:
        left, width = COLUMNS[node.column]
        is_note = node.class_type == "MarkdownNote"
        slots = [] if is_note else list(sockets(info[node.class_type], node))
        values = [node.inputs["text"]] if is_note else [value for _, value in widgets(info[node.class_type], node)]
        entries = []
        for place, (name, kind) in enumerate(slots):
            source = node.inputs.get(name)
            number = None
            if isinstance(source, tuple):
                number = len(links) + 1
                links.append([number, numbers[source[0]], source[1], numbers[node], place, _kind(info, source)])
                outputs.setdefault(source, []).append(number)
            entry = {"name": name, "type": kind, "link": number}
            if not _is_socket(kind):
                entry["widget"] = {"name": name}
            entries.append(entry)
        made = (
            []
            if is_note
            else list(zip(info[node.class_type]["output"], info[node.class_type]["output_name"], strict=True))
        )
        height = node.height or 50 + 22 * max(len(slots), len(made)) + 28 * len(values)
        entry = {
            "id": numbers[node],
            "type": node.class_type,
            "pos": [left, below[node.column]],
            "size": [width, height],
            "flags": {},
            "order": numbers[node] - 1,
            "mode": 0,
            "inputs": entries,
            "outputs": [
                {"name": name, "type": kind, "links": None, "slot_index": i} for i, (kind, name) in enumerate(made)
            ],
            "properties": {} if is_note else {"Node name for S&R": node.class_type},
            "widgets_values": values,
        }
        if node.title:
            entry["title"] = node.title
        nodes.append(entry)
        below[node.column] += height + TITLE
    for (node, slot), numbers_of_links in outputs.items():
        nodes[numbers[node] - 1]["outputs"][slot]["links"] = numbers_of_links
    return {
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {"ds": {"scale": 0.5, "offset": [60, 60]}},
        "version": 0.4,
    }


def _kind(info: dict, source: Ref) -> str:
    node, slot = source
    return info[node.class_type]["output"][slot]


def files(info: dict) -> dict[str, str]:
    """Path below this folder and content of every file."""
    written = {}
    for model in MODELS:
        graph = build(model)
        for path, content in (
            (f"{model.name}.json", interface(graph, info)),
            (f"api/{model.name}.json", api(graph, info)),
        ):
            written[path] = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    return written


def main() -> None:
    with urllib.request.urlopen(f"{sys.argv[1].rstrip('/')}/object_info") as answer:
        info = json.load(answer)
    for path, content in files(info).items():
        (HERE / path).write_text(content, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
