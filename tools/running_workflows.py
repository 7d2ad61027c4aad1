"""The examples of how a training runs, on the embedded model: in the background, and on several processes."""

from collections.abc import Callable

from .embedded_workflows import HELD_OUT, PROMPTS
from .workflow_graph import Add, Layout

BACKGROUND, PROCESSES = "16 Train in the background", "17 Train on two processes"
REAL = """**For a real model:** replace *Demo Model* with your own loaders and *GRPO Base Model*, choose a reward model in *Load Reward* (files in `models/rewards`), write your own prompts, and use *GRPO Preset* `auto` for the settings. Examples 04 to 15 show the loaders."""
NOTES = {
    BACKGROUND: f"""# Train in the background

Queue it, and the graph ends at once, because *GRPO Train LoRA* is set to **in the background**. The training process continues while you queue other graphs, when the browser is closed, and when ComfyUI restarts.

Watch it in the **GRPO** tab of the sidebar: reward curves, samples and time left; **Stop** and **Resume** act at once, outside the queue. A toast says when the run ends.

*GRPO Run* does the same in a graph. Queue again, and it shows the progress and outputs the newest LoRA. Its **action**:
- **look** returns state, rewards, time left and the newest LoRA at once, also during training.
- **stop** ends all processes of the run within seconds and keeps the newest LoRA.
- **resume** continues from the newest checkpoint.
- **watch** waits for the end; Cancel stops the waiting, not the run.

In another graph, give *GRPO Run* the **name** of the run.

{REAL}""",
    PROCESSES: f"""# Train on two processes

**processes** is the number of processes that share the training: one per GPU. The images of an iteration are divided among them and the gradients are summed, so the result is that of one process. Here both run on the CPU (or share one GPU) to show how it works; two processes on one device are not faster.

**gpus** (advanced) lists the GPUs, such as `0,1,2,3`. If it is empty, those that ComfyUI sees are used. Started with `--cuda-device 0`, ComfyUI sees only one: list the others there. Several GPUs need Linux (or WSL).

This graph uses *GRPO Settings*: the twelve settings that matter most are widgets, and all others are lines in **overrides**.

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
    add(3, "PreviewAny", "Progress", source=[run, 0])


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
