"""The examples for released models: the graph's own model is trained and compared with its LoRA."""

from dataclasses import dataclass, field

from .workflow_graph import Graph, Layout

PROMPTS = """a lighthouse on a cliff at dawn, oil painting
two red apples and a green pear on a wooden table
a cyclist crossing a wet street at night
portrait of an old fisherman, soft window light
a paper boat floating in a puddle
a snowy owl on a mossy branch
a tidy desk with a typewriter and a cup of coffee
a market stall full of oranges
a steam train passing through a birch forest
a blue glass vase with three white tulips
an astronaut reading a newspaper on a park bench
a stone bridge over a mountain stream in autumn"""
HELD_OUT = "a fox sitting in tall grass at sunset\na yellow umbrella leaning on a brick wall"
MOVING = """a paper boat drifts down a stream
a cyclist crosses a wet street at night
waves roll onto a pebble beach
a snowy owl takes off from a branch
steam rises from a cup of coffee by the window
a steam train passes through a birch forest
leaves fall from a maple tree in the wind
a cat jumps onto a wooden chair"""
MOVING_HELD_OUT = "a fox runs through fresh snow\nan umbrella opens in the rain"
FROM_FRAME = """the camera moves slowly forward
the subject turns its head and looks at the camera
wind moves through the scene
the light changes from morning to evening
the subject walks to the left
the camera circles around the subject"""
FROM_FRAME_HELD_OUT = "the camera moves slowly back\nrain begins to fall"


@dataclass(frozen=True)
class Example:
    """A kind of model.

    Attributes:
        name: of the graph.
        run: name of its run and LoRA.
        loaders: nodes by name; `model`, `clip` and `vae` say which outputs of theirs are the model's.
        patch: a ModelSampling node and its widgets.
        size: width, height and frames.
        overrides: settings in addition to what preset auto chooses.
        guidance: classifier-free guidance; 1 is none.
        scheduler: one of core's schedulers, or a node that outputs SIGMAS, and its widgets besides steps and size.
        embedded: embedded guidance (an input of the network), if it differs from core's default.
        steps: sampling steps of training and of the comparison.
        latent: the node for the empty latent.
        first_frame: core's node that adds a first frame to conditioning.
        says: part of the note: files, and settings beside those of the released model, with their sources.
    """

    name: str
    run: str
    loaders: dict[str, tuple[str, dict]]
    model: tuple[str, int]
    clip: tuple[str, int]
    vae: tuple[str, int]
    size: tuple[int, int, int]
    steps: int
    says: str
    overrides: tuple[str, ...] = ()
    patch: tuple[str, dict] | None = None
    guidance: float = 1.0
    scheduler: str | tuple[str, dict] = "simple"
    embedded: float | None = None
    latent: str = "EmptySD3LatentImage"
    negative: str = ""
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
DIFFUSION = {"latent": "EmptyLatentImage"}
WAN_NEGATIVE = "overexposed, static, blurred details, subtitles, worst quality, low quality, deformed, still picture"

EXAMPLES = (
    Example(
        name="04 Train SD1.5",
        run="sd15_lora",
        loaders={"checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": "v1-5-pruned-emaonly-fp16.safetensors"})},
        **SINGLE,
        **DIFFUSION,
        size=(512, 512, 1),
        steps=20,
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
        name="05 Train SDXL",
        run="sdxl_lora",
        loaders={"checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": "sd_xl_base_1.0.safetensors"})},
        **SINGLE,
        **DIFFUSION,
        size=(768, 768, 1),
        steps=20,
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
        name="06 Train SD3.5",
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
        overrides=("rollout.guidance_scale=4.5", "objective.updates=1"),
        guidance=4.5,
        patch=("ModelSamplingSD3", {"shift": 3.0}),
        negative="blurry, watermark",
        says="""`sd3.5_medium.safetensors` (network and VAE) in `models/checkpoints`; `clip_l.safetensors`, `clip_g.safetensors` and `t5xxl_fp8_e4m3fn_scaled.safetensors` in `models/text_encoders`. SD3.5 large can be used in its place, also as `fp8_scaled`.

| | here | the model as released |
|---|---|---|
| size | 512 x 512, Flow-GRPO's | 1024 x 1024 |
| steps | 10, Flow-GRPO's | 40 (model card) |
| guidance | 4.5, Flow-GRPO's | 4.5 (model card) |
| shift | 3 | 3 (the model's scheduler) |""",
    ),
    Example(
        name="07 Train FLUX.1",
        run="flux1_lora",
        loaders=parts(
            "flux1-dev.safetensors",
            two_encoders("clip_l.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors", "flux"),
            "ae.safetensors",
        ),
        **SEPARATE,
        size=(512, 512, 1),
        steps=12,
        says="""`flux1-dev.safetensors` in `models/diffusion_models` (24 GB in bf16; set *weight_dtype* to `fp8_e4m3fn` for half of that), `clip_l.safetensors` and `t5xxl_fp8_e4m3fn_scaled.safetensors` in `models/text_encoders`, `ae.safetensors` in `models/vae`.

| | here | the model as released |
|---|---|---|
| size | 512 x 512 | 1024 x 1024; the paper trains at 720 x 720 |
| steps | 12, the paper's LoRA script | 20 (ComfyUI's template), 50 (model card) |
| embedded guidance | 3.5, core's default; for another value connect *FluxGuidance* to *conditioning* | 3.5 (model card and paper) |
| true guidance | none | none |
| shift | ComfyUI's own for FLUX, e^1.15 = 3.16 | 3 in the paper |""",
    ),
    Example(
        name="08 Train FLUX.2",
        run="flux2_lora",
        loaders=parts(
            "flux-2-klein-base-4b.safetensors",
            one_encoder("qwen_3_4b.safetensors", "flux2"),
            "flux2-vae.safetensors",
        ),
        **SEPARATE,
        size=(512, 512, 1),
        steps=12,
        overrides=("rollout.guidance_scale=5", "objective.updates=1"),
        guidance=5.0,
        scheduler=("Flux2Scheduler", {}),
        latent="EmptyFlux2LatentImage",
        says="""FLUX.2 klein, the base model of 4 billion weights, which fits one card: `flux-2-klein-base-4b.safetensors` in `models/diffusion_models`, `qwen_3_4b.safetensors` in `models/text_encoders`, `flux2-vae.safetensors` in `models/vae`. FLUX.2 dev can be used in the same way, with `mistral_3_small_flux2_bf16.safetensors`, guidance 1 and *FluxGuidance* 4 on *conditioning*; the `fp8mixed` file works too.

| | here | the model as released |
|---|---|---|
| size | 512 x 512 | 1024 x 1024 (ComfyUI's template) |
| steps | 12, as for FLUX.1 | 20 (ComfyUI's template) |
| guidance | 5 | 5 (ComfyUI's template) |
| noise levels | *Flux2Scheduler*, connected to *sigmas* | the same |""",
    ),
    Example(
        name="09 Train Qwen-Image",
        run="qwen_image_lora",
        loaders=parts(
            "qwen_image_fp8_e4m3fn.safetensors",
            one_encoder("qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image"),
            "qwen_image_vae.safetensors",
        ),
        **SEPARATE,
        size=(512, 512, 1),
        steps=12,
        patch=("ModelSamplingAuraFlow", {"shift": 3.1}),
        says="""`qwen_image_fp8_e4m3fn.safetensors` (20 GB) in `models/diffusion_models`, `qwen_2.5_vl_7b_fp8_scaled.safetensors` in `models/text_encoders`, `qwen_image_vae.safetensors` in `models/vae`.

| | here | the model as released |
|---|---|---|
| size | 512 x 512; multiples of 32 | 1328 x 1328 |
| steps | 12 | 50 (model card), 20 (ComfyUI's template without its Lightning LoRA) |
| guidance | none, as in DanceGRPO's script | 4 (model card), 2.5 (ComfyUI) |
| shift | 3.1 | 3.1 (ComfyUI's template) |""",
    ),
    Example(
        name="10 Train Z-Image",
        run="z_image_lora",
        loaders=parts("z_image_bf16.safetensors", one_encoder("qwen_3_4b.safetensors", "lumina2"), "ae.safetensors"),
        **SEPARATE,
        size=(512, 512, 1),
        steps=12,
        overrides=("rollout.guidance_scale=4", "objective.updates=1"),
        guidance=4.0,
        patch=("ModelSamplingAuraFlow", {"shift": 3.0}),
        says="""`z_image_bf16.safetensors` (the base, not the turbo) in `models/diffusion_models`, `qwen_3_4b.safetensors` in `models/text_encoders`, `ae.safetensors` in `models/vae`.

| | here | the model as released |
|---|---|---|
| size | 512 x 512 | 1024 x 1024 (ComfyUI's template) |
| steps | 12 | 25 (ComfyUI's template) |
| guidance | 4 | 4 (ComfyUI's template) |
| shift | 3 | 3 (ComfyUI's template) |

For `z_image_turbo_bf16.safetensors`: 8 *Steps*, and guidance 1 in the overrides and as *cfg* on *Compare LoRAs*.""",
    ),
    Example(
        name="11 Train Wan 2.1 T2V",
        run="wan_t2v_lora",
        loaders=parts(
            "wan2.1_t2v_1.3B_fp16.safetensors",
            one_encoder("umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan"),
            "wan_2.1_vae.safetensors",
        ),
        **SEPARATE,
        size=(416, 240, 33),
        steps=12,
        guidance=5.0,
        patch=("ModelSamplingSD3", {"shift": 8.0}),
        latent="EmptyHunyuanLatentVideo",
        negative=WAN_NEGATIVE,
        says="""`wan2.1_t2v_1.3B_fp16.safetensors` in `models/diffusion_models`, `umt5_xxl_fp8_e4m3fn_scaled.safetensors` in `models/text_encoders`, `wan_2.1_vae.safetensors` in `models/vae`.

| | here | the model as released |
|---|---|---|
| size, frames | 416 x 240, 33 (Flow-GRPO's) | 832 x 480, 81 (33 in ComfyUI's template) at 16 a second |
| steps | 12 | 50 (model card), 30 (ComfyUI's template) |
| guidance | 5, as in DanceGRPO's script | 6 (ComfyUI's template) |
| shift | 8 | 8 (model card and ComfyUI's template) |""",
    ),
    Example(
        name="12 Train Wan 2.1 I2V",
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
        guidance=5.0,
        patch=("ModelSamplingSD3", {"shift": 8.0}),
        negative=WAN_NEGATIVE,
        first_frame="WanImageToVideo",
        says="""`wan2.1_i2v_480p_14B_fp16.safetensors` (33 GB; *weight_dtype* `fp8_e4m3fn` for half of that) in `models/diffusion_models`, `umt5_xxl_fp8_e4m3fn_scaled.safetensors` in `models/text_encoders`, `wan_2.1_vae.safetensors` in `models/vae`, `clip_vision_h.safetensors` in `models/clip_vision`, and a first frame in `input`. All prompts of a run share that frame, so they say what moves.

| | here | the model as released |
|---|---|---|
| size, frames | 416 x 240, 33 | 832 x 480, 81 at 16 a second |
| steps | 12 | 40 (model card), 20 (ComfyUI's template) |
| guidance | 5, as in DanceGRPO's script for T2V | 5 (model card), 6 (ComfyUI's template) |
| shift | 8 | 8 (ComfyUI's template), 3 at 480p (model card) |""",
    ),
    Example(
        name="13 Train HunyuanVideo",
        run="hunyuan_video_lora",
        loaders=parts(
            "hunyuan_video_t2v_720p_bf16.safetensors",
            two_encoders("clip_l.safetensors", "llava_llama3_fp8_scaled.safetensors", "hunyuan_video"),
            "hunyuan_video_vae_bf16.safetensors",
        ),
        **SEPARATE,
        size=(480, 320, 17),
        steps=12,
        patch=("ModelSamplingSD3", {"shift": 5.0}),
        latent="EmptyHunyuanLatentVideo",
        fps=24.0,
        says="""`hunyuan_video_t2v_720p_bf16.safetensors` (26 GB; *weight_dtype* `fp8_e4m3fn` for half of that) in `models/diffusion_models`, `clip_l.safetensors` and `llava_llama3_fp8_scaled.safetensors` in `models/text_encoders`, `hunyuan_video_vae_bf16.safetensors` in `models/vae`.

| | here | the model as released |
|---|---|---|
| size, frames | 480 x 320, 17 | 1280 x 720, 129 at 24 a second; 848 x 480, 73 in ComfyUI's template; 480 x 480, 53 in the paper |
| steps | 12 | 50 (model card), 20 (ComfyUI's template), 16 (paper) |
| embedded guidance | 6, core's default | 6 (model card and ComfyUI's template) |
| shift | 5, the paper's | 7 (model card and ComfyUI's template) |""",
    ),
    Example(
        name="14 Train SkyReels-I2V",
        run="skyreels_lora",
        loaders=parts(
            "skyreels_hunyuan_i2v_bf16.safetensors",
            two_encoders("clip_l.safetensors", "llava_llama3_fp8_scaled.safetensors", "hunyuan_video"),
            "hunyuan_video_vae_bf16.safetensors",
        ),
        **SEPARATE,
        size=(512, 320, 17),
        steps=12,
        guidance=5.0,
        patch=("ModelSamplingSD3", {"shift": 7.0}),
        embedded=1.0,
        negative="static, blurred, deformed, low quality",
        first_frame="HunyuanImageToVideo",
        fps=24.0,
        says="""`skyreels_hunyuan_i2v_bf16.safetensors` (26 GB; *weight_dtype* `fp8_e4m3fn` for half of that) in `models/diffusion_models`, `clip_l.safetensors` and `llava_llama3_fp8_scaled.safetensors` in `models/text_encoders`, `hunyuan_video_vae_bf16.safetensors` in `models/vae`, and a first frame in `input`. All prompts of a run share that frame, so they say what moves.

| | here | the model as released |
|---|---|---|
| size, frames | 512 x 320, 17 | 960 x 544, 97 at 24 a second (model card); 640 x 400, 53 in the paper |
| steps | 12 | 30 (model card), 16 (paper) |
| guidance | 5 true and 1 embedded, the paper's | 6 true and 1 embedded (model card) |
| shift | 7, the paper's | 7 (model card) |""",
    ),
    Example(
        name="15 Train LTX-Video",
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
        overrides=("rollout.guidance_scale=3",),
        guidance=3.0,
        scheduler=(
            "LTXVScheduler",
            {"max_shift": 2.05, "base_shift": 0.95, "stretch": True, "terminal": 0.1},
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
| noise levels | *LTXVScheduler* 2.05, 0.95, stretched to 0.1, connected to *sigmas* | the same |
| frame rate | 25, by *LTXVConditioning* | 25 |""",
    ),
)

# ---------------------------------------------------------------------------------------------------------- the graphs

WIDTHS = (480, 400, 380, 360, 440, 480)
GROUPS = (("1. Model", 1, 1), ("2. Rewards and settings", 2, 3), ("3. Train", 4, 4), ("4. Compare", 5, 5))


def build(example: Example, graph: Graph) -> None:
    """Loaders, base model, rewards, training, and the base model beside the LoRA."""
    loaded = {name: graph.add(1, kind, **inputs) for name, (kind, inputs) in example.loaders.items()}
    model, clip, vae = ([loaded[name], output] for name, output in (example.model, example.clip, example.vae))
    if example.patch:
        kind, inputs = example.patch
        model = [graph.add(1, kind, model=model, **inputs), 0]
    size = _size(example, graph)
    steps = [graph.add(1, "PrimitiveInt", "Steps", value=example.steps), 0]
    base, levels = _base_model(example, graph, model, vae, size, steps)
    reward = _reward(graph, example.is_video)
    settings = graph.add(
        3,
        "DanceGRPO_Preset",
        preset="auto",
        overrides="\n".join(("runtime.iterations=200", *example.overrides)),
        steps=steps,
    )
    texts = (MOVING, MOVING_HELD_OUT) if example.is_video else (PROMPTS, HELD_OUT)
    texts = (FROM_FRAME, FROM_FRAME_HELD_OUT) if example.first_frame else texts
    held_out = graph.add(3, "PrimitiveStringMultiline", "Held-out prompts", value=texts[1])
    carried, latent = _carried(example, graph, loaded, clip, vae, size)
    train = graph.add(
        4,
        "DanceGRPO_TrainLoRA",
        grpo_model=[base, 0],
        reward=[reward, 0],
        clip=clip,
        settings=[settings, 0],
        name=example.run,
        prompts=texts[0],
        held_out_prompts=[held_out, 0],
        negative=example.negative,
        **carried,
    )
    graph.add(
        5,
        "DanceGRPO_CompareLoRAs",
        model=model,
        clip=clip,
        vae=vae,
        latent_image=latent,
        reward=[reward, 0],
        lora_model_1=[train, 0],
        prompts=[held_out, 0],
        negative=example.negative,
        images_per_prompt=1 if example.is_video else 4,
        steps=steps,
        cfg=example.guidance,
        **({"scheduler": example.scheduler} if levels is None else {"sigmas": levels}),
        **carried,
    )


def layout(example: Example) -> Layout:
    return Layout(_note(example), WIDTHS, GROUPS, 980)


def _size(example: Example, graph: Graph) -> dict[str, list]:
    """Width, height and, of videos, frames, each in one place for training and comparison."""
    names = ("width", "height", "frames") if example.is_video else ("width", "height")
    return {
        name: [graph.add(1, "PrimitiveInt", name.capitalize(), value=value), 0]
        for name, value in zip(names, example.size, strict=False)
    }


def _base_model(
    example: Example, graph: Graph, model: list, vae: list, size: dict[str, list], steps: list
) -> tuple[str, list | None]:
    """GRPO Base Model, and the noise levels if a separate node outputs them."""
    levels = None
    if isinstance(example.scheduler, tuple):
        kind, inputs = example.scheduler
        wired = {name: link for name, link in {**size, "steps": steps}.items() if name in _inputs(graph, kind)}
        levels = [graph.add(2, kind, **inputs, **wired), 0]
    base = graph.add(
        2,
        "DanceGRPO_BaseModel",
        folder="(none in models/diffusers)",
        model=model,
        vae=vae,
        **size,
        gradient_checkpointing=example.checkpointing,
        **({"scheduler": example.scheduler} if levels is None else {"sigmas": levels}),
    )
    return base, levels


def _inputs(graph: Graph, kind: str) -> set[str]:
    """Names of a node's inputs."""
    return {name for section in graph.info[kind]["input"].values() for name in section}


def _reward(graph: Graph, is_video: bool) -> str:
    if is_video:
        # Text alignment is left out, as in the paper.
        return graph.add(2, "DanceGRPO_LoadReward", reward="videoalign", **{"reward.text": 0.0})
    preferred = graph.add(2, "DanceGRPO_LoadReward", reward="hps-v2.1")
    fitting = graph.add(2, "DanceGRPO_LoadReward", reward="clip")
    return graph.add(
        3, "DanceGRPO_CombineRewards", reward_1=[preferred, 0], reward_2=[fitting, 0], weight_1=0.7, weight_2=1.4
    )


def _carried(
    example: Example, graph: Graph, loaded: dict[str, str], clip: list, vae: list, size: dict[str, list]
) -> tuple[dict[str, list], list]:
    """What the conditioning has besides the text, as an input of nodes; and the empty latent."""
    length = {"length": size["frames"]} if example.is_video else {}
    size = {"width": size["width"], "height": size["height"], "batch_size": 1}
    is_carried = example.embedded is not None or example.first_frame or example.latent == "EmptyLTXVLatentVideo"
    positive = (
        [graph.add(3, "CLIPTextEncode", "Conditioning besides the text", clip=clip, text=""), 0] if is_carried else []
    )
    if example.embedded is not None:
        positive = [graph.add(3, "FluxGuidance", conditioning=positive, guidance=example.embedded), 0]
    if example.first_frame:
        return _first_frame(example, graph, loaded, vae, positive, size | length)
    if example.latent == "EmptyLTXVLatentVideo":
        rate = graph.add(3, "LTXVConditioning", positive=positive, negative=positive, frame_rate=example.fps)
        positive = [rate, 0]
    latent = [graph.add(4, example.latent, **size, **length), 0]
    return ({"conditioning": positive} if positive else {}), latent


def _first_frame(
    example: Example, graph: Graph, loaded: dict[str, str], vae: list, text: list, size: dict
) -> tuple[dict[str, list], list]:
    image = [graph.add(2, "LoadImage", "First frame", image="example.png"), 0]
    if example.first_frame == "WanImageToVideo":
        seen = graph.add(1, "CLIPVisionEncode", clip_vision=[loaded["vision"], 0], image=image, crop="none")
        vision = {"clip_vision_output": [seen, 0], "negative": text}
        node = graph.add(3, "WanImageToVideo", positive=text, vae=vae, start_image=image, **vision, **size)
        return {"conditioning": [node, 0]}, [node, 2]
    node = graph.add(
        3, example.first_frame, positive=text, vae=vae, start_image=image, guidance_type="v1 (concat)", **size
    )
    return {"conditioning": [node, 0]}, [node, 1]


def _note(example: Example) -> str:
    return f"""# {example.name.split(" ", 1)[1]}

Queue it: training runs in a separate process. The LoRA is then compared with the base model on the held-out prompts, from the same noise. It is also a file in `output/loras/dancegrpo`, which every LoRA loader lists.

**Files:** {example.says}

**Rewards**: put their files into `models/rewards` under the names on *Load Reward*; `docs/rewards.md` of this pack says where to get them. **Prompts**: these are examples; write a few hundred of your own. **Settings**: preset `auto` chooses them for this model and your GPU, and *GRPO Train LoRA* shows what it chose and why; the lines in **overrides** take precedence. Size and steps are set once, on the nodes with those names beside the loaders, for training and comparison; guidance is set in the overrides of the preset and as *cfg* on *Compare LoRAs*.

The settings are starting points: the graph was checked with ComfyUI's nodes, but never run on the released weights."""
