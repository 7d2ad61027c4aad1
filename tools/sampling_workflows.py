"""The examples without training, on the embedded model: scoring, a LoRA during a part of the steps, and SDE noise."""

from collections.abc import Callable

from .workflow_graph import Add, Layout

BEST, PARTLY, ETA = "18 Score and pick the best of 16", "19 Use a LoRA early or late", "20 What eta does"
NOTES = {
    BEST: """# Score and pick the best of 16

Sixteen images of one prompt are scored by the reward `shapes` (does an image show what the prompt says?), and the best four are kept, best first.

*Score Images* shows a bar per image. It also gives the scores as a list of floats and as text, for other nodes. *Combine Rewards* gives the weighted sum of several rewards.

Other prompts that the demo model knows: `three triangles`, `a circle above a square`, `a purple square`. Change both prompts, the one that is sampled and the one on *Score Images*.

**For a real model:** replace *Demo Model* with your own loaders and set the latent's size. Choose another reward in *Load Reward*; its files go into `models/rewards`. `shapes` scores only images of the demo model; `brightness`, `colorfulness`, `sharpness` and `jpeg-size` score any image.""",
    PARTLY: """# Use a LoRA early or late

The same LoRA and the same initial noise of eight images, twice:
- **upper row: early** (percent 0 to 0.5), where composition, counts and colours are decided
- **lower row: late** (percent 0.5 to 1), where edges and texture are decided

What a reward teaches well is mostly decided early; over-optimisation shows mostly in the texture. So a LoRA that looks too glossy is often still useful if *end_percent* is 0.5 to 0.8.

The LoRA here was trained on the demo model by this pack's demo (`make demo`).

**For a real model:** replace *Demo Model* with your own loaders, and choose your file in `lora_name` of *Apply LoRA over Sigmas*: trained LoRAs are listed under `dancegrpo/`. The `lora` input takes the LORA_MODEL of *GRPO Train LoRA* or *GRPO Run* in the same graph.""",
    ETA: """# What eta does

Four images, one prompt, **one initial noise** (*Group Noise*). They differ only by the noise that the steps add: this is how GRPO makes the images of a group.

Change `kernel` and `eta` on the *SDE Sampler*, and queue again:
- `ode`, or eta 0: no noise, so all four images are the same
- `dance`, eta 0.3 to 0.5: the paper's kernel
- `dance`, eta 1.0: more variety
- `dance-exact`: the same SDE solved exactly, without the residual noise that `dance` leaves at few steps
- `cps`, eta 0.9: nearly all of the noise is new at each step

For training, choose an eta at which the images differ in what you reward and have no visible noise.

**For a real model:** replace *Demo Model* (MODEL, CLIP, VAE) with your own loaders, set the size of the empty latent, and use 16 to 28 steps. FLUX, SD3, Qwen-Image, Wan: `dance` with eta 0.3. SD1.5 and SDXL: kernel `ddim`, eta 0 to 1.""",
}
LAYOUTS = {
    BEST: Layout(
        NOTES[BEST], (440, 320, 340, 340), (("1. Sixteen images", 1, 2), ("2. Score, and keep the best", 3, 3))
    ),
    PARTLY: Layout(NOTES[PARTLY], (440, 320, 340, 320, 420), (("1. Early and late", 1, 3), ("2. Compare", 4, 4))),
    ETA: Layout(NOTES[ETA], (440, 320, 320, 420), (("1. A group of four", 1, 2), ("2. The images", 3, 3))),
}
PLAIN = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


def _ksampler(add: Add, column: int, title: str, model: list, text: str, latent: str, **widgets: int) -> str:
    return add(
        column,
        "KSampler",
        title,
        model=model,
        positive=[text, 0],
        negative=[text, 0],
        latent_image=[latent, 0],
        **PLAIN,
        **widgets,
    )


def best_of_16(add: Add) -> None:
    model = add(1, "DanceGRPO_DemoModel")
    text = add(1, "CLIPTextEncode", "Prompt", clip=[model, 1], text="a red circle and a blue square")
    latent = add(1, "EmptySD3LatentImage", width=64, height=64, batch_size=16)
    sampled = _ksampler(add, 2, "", [model, 0], text, latent, seed=11, steps=12)
    images = add(2, "VAEDecode", samples=[sampled, 0], vae=[model, 2])
    reward = add(2, "DanceGRPO_LoadReward", reward="shapes")
    scores = add(
        3,
        "DanceGRPO_ScoreImages",
        reward=[reward, 0],
        images=[images, 0],
        prompt="a red circle and a blue square",
    )
    best = add(3, "DanceGRPO_PickBest", images=[images, 0], scores=[scores, 0], k=4)
    add(3, "SaveImage", "The best 4", images=[best, 0], filename_prefix="dancegrpo/best_of_16")


def early_or_late(add: Add) -> None:
    model = add(1, "DanceGRPO_DemoModel")
    text = add(1, "CLIPTextEncode", "Prompt", clip=[model, 1], text="a green circle")
    latent = add(1, "EmptySD3LatentImage", width=64, height=64, batch_size=8)
    rows = []
    for title, first, last in (("early", 0.0, 0.5), ("late", 0.5, 1.0)):
        limited = add(
            2,
            "DanceGRPO_ApplyLoRAOverSigmas",
            f"LoRA {title}",
            model=[model, 0],
            lora=[model, 4],
            start_percent=first,
            end_percent=last,
        )
        sampled = _ksampler(add, 3, f"Sample: LoRA {title}", [limited, 0], text, latent, seed=3, steps=12)
        rows.append(sampled)
    both = add(4, "LatentBatch", "Early, then late", samples1=[rows[0], 0], samples2=[rows[1], 0])
    images = add(4, "VAEDecode", samples=[both, 0], vae=[model, 2])
    grid = add(4, "ImageGrid", images=[images, 0], columns=8, cell_width=128, cell_height=128, padding=4)
    add(4, "SaveImage", images=[grid, 0], filename_prefix="dancegrpo/lora_early_late")


def what_eta_does(add: Add) -> None:
    model = add(1, "DanceGRPO_DemoModel")
    text = add(1, "CLIPTextEncode", "Prompt", clip=[model, 1], text="a red circle and a blue square")
    latent = add(1, "EmptySD3LatentImage", width=64, height=64, batch_size=4)
    sampler = add(2, "DanceGRPO_SDESampler", kernel="dance", eta=0.5, seed=1)
    sigmas = add(1, "BasicScheduler", model=[model, 0], scheduler="simple", steps=16, denoise=1.0)
    guider = add(2, "BasicGuider", model=[model, 0], conditioning=[text, 0])
    noise = add(2, "DanceGRPO_GroupNoise", noise_seed=7)
    sampled = add(
        2,
        "SamplerCustomAdvanced",
        noise=[noise, 0],
        guider=[guider, 0],
        sampler=[sampler, 0],
        sigmas=[sigmas, 0],
        latent_image=[latent, 0],
    )
    images = add(3, "VAEDecode", samples=[sampled, 0], vae=[model, 2])
    add(
        3,
        "SaveImage",
        "Four images from one initial noise",
        images=[images, 0],
        filename_prefix="dancegrpo/what_eta_does",
    )


GRAPHS: dict[str, Callable[[Add], None]] = {BEST: best_of_16, PARTLY: early_or_late, ETA: what_eta_does}
