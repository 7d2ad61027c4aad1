"""The main example, on the embedded model: training from rewards, and the comparison with the base model."""

from collections.abc import Callable

from .workflow_graph import Add, Layout

WIDTHS = (480, 340, 340, 440, 480)
GROUPS = (("1. Model, rewards and settings", 1, 2), ("2. Train", 3, 3), ("3. Compare", 4, 4))
PROMPTS = """a circle
a picture of a circle
a drawing of a circle
a print of a circle
a square
a picture of a square
a poster of a square
a print of a square
a triangle
a picture of a triangle
a poster of a triangle
a print of a triangle
a circle and a square
a drawing of a circle and a square
a picture of a circle and a triangle
an image of a circle and a triangle
a square and a circle
a poster of a square and a circle
a square and a triangle
a drawing of a square and a triangle
a triangle and a circle
a drawing of a triangle and a circle
a triangle and a square
a poster of a triangle and a square
two circles
an image of two circles
a poster of three circles
a picture of four circles
two squares
a print of two squares
a poster of three squares
an image of four squares
a drawing of two triangles
a print of two triangles
a poster of three triangles
a drawing of four triangles
a picture of a red circle
a drawing of a green circle
a yellow circle
a drawing of a purple circle
a red square
a drawing of a green square
a yellow square
a poster of a purple square
a red triangle
a poster of a green triangle
a yellow triangle
a poster of a purple triangle
a circle to the left of a square
a drawing of a circle above a square
a drawing of a circle to the left of a triangle
a drawing of a circle above a triangle
a square to the left of a circle
a square above a circle
a picture of a square to the left of a triangle
a drawing of a square above a triangle
a picture of a triangle to the left of a circle
a picture of a triangle above a circle
a triangle to the left of a square
a triangle above a square
a red circle and a green square
a picture of a blue circle and a purple square
a drawing of a red circle and a blue triangle
an image of a blue circle and a purple triangle
a poster of a red square and a purple circle
a print of a yellow square and a green circle
an orange square and a purple circle
a picture of a blue square and a yellow triangle
a drawing of an orange square and a green triangle
an image of a blue triangle and a red circle
a poster of an orange triangle and a red circle
a print of a blue triangle and a red square"""
HELD_OUT = """an image of a circle
a poster of a circle
an image of a square
a drawing of a triangle
a poster of a circle and a square
a print of a circle and a triangle
a poster of a square and a triangle
a poster of a triangle and a circle
a poster of two circles
an image of four circles
an image of three squares
a picture of two triangles
a red circle
a print of a purple circle
a picture of a yellow square
a drawing of a green triangle
an image of a circle to the left of a square
a circle above a triangle
a square to the left of a triangle
a triangle above a circle
a blue circle and a red square
an image of a purple circle and a red triangle
a yellow square and a red triangle
an image of a red triangle and a blue square"""
NOTE = """# Train a LoRA from rewards

Queue it: training runs in a separate process, and *GRPO Train LoRA* shows progress, rewards and the newest samples. Then *Compare LoRAs* samples the held-out prompts with the base model and with the LoRA, from the same noise, and scores both.

- **Queue again**, and nothing is trained twice: the result of the run `shapes_lora` is used. Other settings or prompts need another **name**.
- **Cancel** stops the training within seconds and keeps the newest LoRA. Queue again to resume, also after a crash or a restart.
- The LoRA is also a file, `output/loras/dancegrpo/shapes_lora_<iteration>.safetensors`, which every LoRA loader lists (press R).
- Each iteration samples a group of images for each of several training prompts, scores them, and moves the LoRA towards the better images of each group.

The second reward is a **threshold**: an image that is bright enough gets 1, any other 0. With a plain score, training would keep raising the brightness, and the shapes would become pale.

**For a real model:** replace *Demo Model*'s MODEL, CLIP and VAE with those of your own loaders, connect MODEL and VAE to *GRPO Base Model*, and its GRPO_MODEL to *GRPO Train LoRA*: the model that your graph loads is trained. Choose a reward model in *Load Reward* (files in `models/rewards`), write your own prompts (at least a few dozen; the more varied, the better), and set *GRPO Preset* to `auto`. Examples 04 to 15 do this for released models."""


def compare(add: Add, column: int, model: str, latent: str, reward: str, train: str, prompts: str | list) -> None:
    """Add Compare LoRAs for the demo model, with the sampling settings of the demo's evaluation."""
    add(
        column,
        "DanceGRPO_CompareLoRAs",
        model=[model, 0],
        clip=[model, 1],
        vae=[model, 2],
        latent_image=[latent, 0],
        reward=[reward, 0],
        lora_model_1=[train, 0],
        prompts=prompts,
        steps=10,
        sampler_name="euler",
        scheduler="simple",
    )


def train_from_rewards(add: Add) -> None:
    model = add(1, "DanceGRPO_DemoModel")
    adherence = add(1, "DanceGRPO_LoadReward", reward="shapes")
    light = add(1, "DanceGRPO_LoadReward", reward="brightness")
    enough = add(1, "DanceGRPO_ThresholdReward", reward=[light, 0], threshold=0.885)
    reward = add(2, "DanceGRPO_CombineRewards", reward_1=[adherence, 0], reward_2=[enough, 0], weight_2=0.5)
    settings = add(2, "DanceGRPO_Preset", preset="demo")
    latent = add(1, "EmptySD3LatentImage", width=64, height=64, batch_size=1)
    train = add(
        3,
        "DanceGRPO_TrainLoRA",
        grpo_model=[model, 3],
        reward=[reward, 0],
        clip=[model, 1],
        settings=[settings, 0],
        name="shapes_lora",
        prompts=PROMPTS,
        held_out_prompts=HELD_OUT,
    )
    compare(add, 4, model, latent, reward, train, HELD_OUT)


GRAPHS: dict[str, Callable[[Add], None]] = {"01 Train a LoRA from rewards": train_from_rewards}
LAYOUTS = {"01 Train a LoRA from rewards": Layout(NOTE, WIDTHS, GROUPS, 760)}
