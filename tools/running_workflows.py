"""The examples of how a training runs, on the embedded model: in the background, and on several processes."""

from collections.abc import Callable

from .embedded_workflows import HELD_OUT, PROMPTS
from .workflow_graph import Add, Layout

BACKGROUND, PROCESSES = "16 Train in the background", "17 Train on two processes"
REAL = """**For a real model:** put your own loaders and *GRPO Base Model* in place of *Demo Model*, choose a reward model in *Load Reward* (files in `models/rewards`), write your own prompts, and choose a preset for your model. Examples 04 to 15 show the loaders."""
NOTES = {
    BACKGROUND: f"""# Train in the background

Queue it, and it is done at once: *GRPO Train LoRA* is set to **in the background**. The training is a process of its own, which goes on while you queue other things, with the browser closed, and through a restart of ComfyUI.

Watch it in the **GRPO** tab of the sidebar: reward curves, samples and time left; **Stop** and **Resume** act at once, outside the queue. A toast says when the run ends.

*GRPO Run* does the same from a graph. Queue again, and it says how far the run is and gives its newest LoRA. Its **action**:
- **look** gives state, rewards, time left and the newest LoRA, also during training.
- **stop** ends every process within seconds and keeps what was learned.
- **resume** goes on from the last iteration.
- **watch** waits for the end; cancelling it ends the watching alone.

In a graph of its own, give *GRPO Run* the **name** of the run.

{REAL}""",
    PROCESSES: f"""# Train on two processes

**processes** is how many share the training: one per GPU. The images of an iteration are divided among them and the gradients are added up, so the result is that of one process, only sooner. Here both run on the CPU (or share what GPU there is), just to show it: with two processes on one device nothing gets faster.

**gpus** (advanced) names the GPUs, such as `0,1,2,3`. Empty takes those that ComfyUI itself sees: started with `--cuda-device 0` it sees one, so name the others. Several GPUs need Linux (or WSL).

This graph uses *GRPO Settings*: the dozen settings that matter most, and every other one as a line in the box **overrides**.

{REAL}""",
}
LAYOUTS = {
    BACKGROUND: Layout(
        NOTES[BACKGROUND], (480, 340, 440, 440), (("1. Start", 1, 2), ("2. Look, stop, resume or watch", 3, 3)), 760
    ),
    PROCESSES: Layout(NOTES[PROCESSES], (480, 340, 440, 440), (("1. Train", 1, 2), ("2. Result", 3, 3))),
}


def background(add: Add) -> None:
    model = add(1, "DanceGRPO_DemoModel")
    reward = add(1, "DanceGRPO_LoadReward", reward="shapes")
    settings = add(1, "DanceGRPO_Preset", preset="demo", overrides="runtime.iterations=20")
    train = add(
        2,
        "DanceGRPO_TrainLoRA",
        "Start in the background",
        grpo_model=[model, 3],
        reward=[reward, 0],
        clip=[model, 1],
        settings=[settings, 0],
        name="background_lora",
        prompts=PROMPTS,
        held_out_prompts=HELD_OUT,
        wait=False,
    )
    run = add(3, "DanceGRPO_Run", run=[train, 3], action="look")
    add(3, "PreviewAny", "How far it is", source=[run, 0])


def two_processes(add: Add) -> None:
    model = add(1, "DanceGRPO_DemoModel")
    reward = add(1, "DanceGRPO_LoadReward", reward="shapes")
    settings = add(
        1,
        "DanceGRPO_Settings",
        runtime_iterations=10,
        rollout_prompts_per_iteration=4,
        rollout_group_size=8,
        rollout_steps=8,
        rollout_kernel="cps",
        rollout_eta=0.5,
        optimizer_learning_rate=2e-3,
    )
    train = add(
        2,
        "DanceGRPO_TrainLoRA",
        grpo_model=[model, 3],
        reward=[reward, 0],
        clip=[model, 1],
        settings=[settings, 0],
        name="two_processes",
        prompts=PROMPTS,
        held_out_prompts=HELD_OUT,
        processes=2,
    )
    add(3, "SaveImage", "Reward curve", images=[train, 4], filename_prefix="dancegrpo/two_processes_curve")
    add(3, "PreviewAny", "Name in the LoRA loaders", source=[train, 2])


GRAPHS: dict[str, Callable[[Add], None]] = {BACKGROUND: background, PROCESSES: two_processes}
