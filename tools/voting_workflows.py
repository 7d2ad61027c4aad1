"""The examples for votes, on the embedded model; `build_workflows` writes them."""

from collections.abc import Callable

from .embedded_workflows import compare
from .workflow_graph import Add, Layout

WIDTHS = (440, 300, 320, 340, 360, 420, 420)
"""Of the columns; the note is in the first."""
GROUPS = (
    ("1. Make images, and vote on them in the sidebar", 1, 3),
    ("2. Train on your votes", 4, 5),
    ("3. Compare", 6, 6),
)
"""Title, first and last column."""
PROMPTS = """a circle
a square
a triangle
a picture of a circle
a poster of a square
a print of a triangle
a circle and a square
a square and a triangle
a triangle and a circle
a drawing of a triangle and a square
two circles
three squares
a drawing of two triangles
a circle above a square
a square to the left of a triangle
a triangle below a circle"""
HELD_OUT = """an image of a circle
an image of a square
a drawing of a triangle
a poster of a circle and a square
a print of a circle and a triangle
a poster of two circles
an image of three squares
a picture of two triangles"""
REWARD = """objective={name: nft}
rollout.steps=6
rollout.solver=2m
rollout.prompts_per_iteration=6
rollout.group_size=6
optimizer.learning_rate=1.5e-3
lora.ema_decay=0
runtime.iterations=20"""
PAIRS = """rollout.prompts_per_iteration=24
optimizer.learning_rate=1e-3
lora.ema_decay=0
runtime.iterations=30"""
MODELS = """**For a real model:** replace *Demo Model* with your own loaders and *GRPO Base Model*, connect the loaders' CLIP to *GRPO Train LoRA*, and set *GRPO Preset* to `auto`; examples 04 to 15 show the loaders. The **overrides** are for the embedded model only: replace them with `optimizer.learning_rate=1e-4`, to begin with."""
STEPS = """1. Select *GRPO Collect for Voting* and press the small play button above it: only that part runs, and makes 128 images.
2. Open the **GRPO** tab of the sidebar, *Votes*: arrow keys choose the better image of a pair. 40 votes take about two minutes. The panel shows the agreement: how well the fitted model predicts your votes.
3. Queue the graph."""

NOTES = {
    "02 Teach it what you like": f"""# Teach it what you like

Vote on pairs of images; a reward model learns from the votes what you like, and the LoRA learns from it.

{STEPS}

Without votes, *Load Reward* reports an error. To train with new votes, start another run: change the *name* on *GRPO Train LoRA*.

The reward model does not read prompts, so an image with a high score need not show what its prompt asks for: look at the images, train for few iterations, or add a reward that reads prompts with *Combine Rewards*. `docs/votes.md` has measurements.

{MODELS} The backbone `pixels` describes only colours and layout; choose a CLIP vision file in *Load Reward* to describe what an image shows, too.""",
    "03 dpo straight from pairs": f"""# dpo straight from pairs

Vote on pairs of images; the LoRA learns directly from the pairs. No images are made while it trains, and no reward is needed.

{STEPS}

A pair is a vote with a winner on two images of one prompt. Ties and skipped pairs are left out; the log says how many. To train with new votes, start another run: change the *name* on *GRPO Train LoRA*.

*beta* says how closely the model is kept to the base model: a smaller one moves it further, also away from its prompts. `docs/votes.md` compares both ways.

{MODELS}""",
}


def _collected(add: Add, name: str) -> tuple[str, str, str]:
    """Add images of every prompt to a collection; returns the model, the prompts and the empty latent."""
    model = add(1, "DanceGRPO_DemoModel")
    prompts = add(1, "DanceGRPO_PromptLines", prompts=PROMPTS)
    text = add(2, "CLIPTextEncode", "Prompts, one at a time", clip=[model, 1], text=[prompts, 0])
    latent = add(1, "EmptySD3LatentImage", width=64, height=64, batch_size=8)
    sample = add(
        2,
        "KSampler",
        model=[model, 0],
        positive=[text, 0],
        negative=[text, 0],
        latent_image=[latent, 0],
        seed=1,
        steps=10,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    images = add(3, "VAEDecode", samples=[sample, 0], vae=[model, 2])
    add(3, "DanceGRPO_CollectForVoting", images=[images, 0], prompt=[prompts, 0], name=name)
    return model, prompts, latent


def reward_model(add: Add) -> None:
    model, prompts, latent = _collected(add, "my_votes")
    reward = add(
        4,
        "DanceGRPO_LoadReward",
        reward="preference",
        **{"reward.collection": "my_votes", "reward.backbone": "pixels"},
    )
    settings = add(4, "DanceGRPO_Preset", preset="demo", overrides=REWARD)
    train = add(
        5,
        "DanceGRPO_TrainLoRA",
        grpo_model=[model, 3],
        reward=[reward, 0],
        settings=[settings, 0],
        name="what_i_like",
        prompts=[prompts, 0],
        held_out_prompts="",
    )
    compare(add, 6, model, latent, reward, train, HELD_OUT)


PAIR_OPTIONS = {"objective.collection": "my_votes", "objective.beta": 20.0, "objective.noise_levels": 2}


def pairs(add: Add) -> None:
    model, *_ = _collected(add, "my_votes")
    objective = add(4, "DanceGRPO_Objective", objective="dpo", **PAIR_OPTIONS)
    settings = add(4, "DanceGRPO_Preset", preset="demo", overrides=PAIRS)
    train = add(
        5,
        "DanceGRPO_TrainLoRA",
        grpo_model=[model, 3],
        objective=[objective, 0],
        settings=[settings, 0],
        name="my_pairs",
        prompts="",
        held_out_prompts=HELD_OUT,
    )
    add(6, "SaveImage", "Held-out prompts before and after", images=[train, 5], filename_prefix="dancegrpo/my_pairs")


GRAPHS: dict[str, Callable[[Add], None]] = {
    "02 Teach it what you like": reward_model,
    "03 dpo straight from pairs": pairs,
}
LAYOUTS = {name: Layout(note, WIDTHS, GROUPS) for name, note in NOTES.items()}
