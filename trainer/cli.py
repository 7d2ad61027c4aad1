"""The command line: train, resume, status, stop, demo, encode, score, presets."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from . import launch
from .config import RunConfig, parse_config, preset, preset_names, read_config
from .errors import BadInput, RunFailed

FINISHED, FAILED, BAD_INPUT = 0, 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 finished or stopped on request, 1 failed, 2 bad input."""
    args = _parser().parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is ever downloaded by a run
    try:
        return args.run(args)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"failed: {error.strerror or error}: {error.filename or 'a file of the run'}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Teach an image model what you like.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a LoRA from a run description")
    train.add_argument("description", type=Path, help="run description, YAML or JSON")
    train.add_argument("--output", type=Path, help="run directory; default runs/<name of the description>")
    train.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", dest="overrides")
    train.add_argument("--processes", type=_positive, default=1, help="processes on this host (one per GPU)")
    train.set_defaults(run=_train)

    resume = commands.add_parser("resume", help="go on with a run that was stopped or killed")
    resume.add_argument("directory", type=Path)
    resume.add_argument("--processes", type=_positive, default=1)
    resume.set_defaults(run=_resume)

    status = commands.add_parser("status", help="print the state of a run as JSON")
    status.add_argument("directory", type=Path)
    status.set_defaults(run=_status)

    stop = commands.add_parser("stop", help="stop a run; it keeps what was learned and can be resumed")
    stop.add_argument("directory", type=Path)
    stop.set_defaults(run=_stop)

    demo = commands.add_parser("demo", help="train on the embedded model, without downloads")
    demo.add_argument("--output", type=Path, help="run directory; default runs/demo-<seed>")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--processes", type=_positive, default=1)
    demo.set_defaults(run=_demo)

    encode = commands.add_parser(
        "encode", help="encode a description's prompts, so that training loads no text encoder"
    )
    encode.add_argument("description", type=Path)
    encode.add_argument("--output", type=Path, required=True, help="file of conditions, .safetensors")
    encode.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", dest="overrides")
    encode.set_defaults(run=_encode)

    score = commands.add_parser("score", help="score image files with a reward")
    score.add_argument("reward", help="name of the reward")
    score.add_argument("images", nargs="+", type=Path)
    score.add_argument("--prompt", action="append", required=True, help="one for all images, or one for each")
    score.set_defaults(run=_score)

    presets = commands.add_parser("presets", help="list the presets, or print one as a run description")
    presets.add_argument("name", nargs="?")
    presets.set_defaults(run=_presets)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


# ------------------------------------------------------------------------------------------------------------ commands


def _train(args: argparse.Namespace) -> int:
    config = read_config(args.description, args.overrides)
    output = args.output or Path("runs") / args.description.stem
    arguments = ["train", str(args.description), "--output", str(output)]
    arguments += [word for override in args.overrides for word in ("--set", override)]
    return _run(config, output, arguments, args.processes)


def _resume(args: argparse.Namespace) -> int:
    from .run import RunDirectory

    config = RunDirectory.attach(args.directory).config()
    return _run(config, args.directory, ["resume", str(args.directory)], args.processes)


def _demo(args: argparse.Namespace) -> int:
    config = parse_config(preset("demo"), [f"runtime.seed={args.seed}"])
    output = args.output or Path("runs") / f"demo-{args.seed}"
    arguments = ["demo", "--seed", str(args.seed), "--output", str(output)]
    return _run(config, output, arguments, args.processes)


def _status(args: argparse.Namespace) -> int:
    from .run import RunDirectory

    run = RunDirectory.attach(args.directory)
    print(json.dumps({**run.status(), "live": run.is_live()}, indent=2))
    return FINISHED


def _stop(args: argparse.Namespace) -> int:
    from .run import RunDirectory

    run = RunDirectory.attach(args.directory)
    stopped = launch.stop(run)
    state = run.status().get("state", "never started")
    print(f"{'stopped' if stopped else 'was not running'}: {args.directory} ({state})")
    return FINISHED


def _encode(args: argparse.Namespace) -> int:
    from .conditions import all_texts, save_conditions
    from .distributed import Processes
    from .models import model_class
    from .prompting import evaluation_prompts, training_prompts

    config = read_config(args.description, args.overrides)
    family = model_class(config.model)
    texts = all_texts(config, training_prompts(config.prompts), evaluation_prompts(config.evaluation))
    device = Processes(config.runtime.device).device
    save_conditions(args.output, texts, family.encode(config.model, texts, device))
    print(f"{len(texts)} prompts encoded into {args.output}; name it in prompts.conditions")
    return FINISHED


def _score(args: argparse.Namespace) -> int:
    from .config import RewardConfig
    from .pictures import read_images
    from .rewards import load_reward, score

    if len(args.prompt) not in (1, len(args.images)):
        raise BadInput(f"{len(args.prompt)} prompts for {len(args.images)} images: give one for all, or one for each")
    reward = load_reward(RewardConfig(name=args.reward))
    prompts = args.prompt * len(args.images) if len(args.prompt) == 1 else args.prompt
    for path, image, prompt in zip(args.images, read_images(args.images), prompts, strict=True):
        try:
            value = score(reward, image[None], [prompt])[0].item()
        except ValueError as error:
            raise BadInput(f"{path}: {error}") from error
        print(f"{value:.6f}\t{path}\t{prompt}")
    return FINISHED


def _presets(args: argparse.Namespace) -> int:
    if args.name is None:
        print("\n".join(preset_names()))
    else:
        print(parse_config(preset(args.name)).to_yaml(), end="")
    return FINISHED


# ----------------------------------------------------------------------------------------------------------- running


def _run(config: RunConfig, output: Path, arguments: list[str], processes: int) -> int:
    from .run import RunDirectory

    if processes > 1 and "WORLD_SIZE" not in os.environ:
        RunDirectory.open(output, config, arguments).release()
        launch.run_and_wait(arguments, processes)
        return _verdict(output)
    code = _run_here(config, output, arguments)
    # A launcher turns any code but 0 into its own error report; the one who called it reads the status instead.
    return FINISHED if "WORLD_SIZE" in os.environ and launch.CHILD_MARK in os.environ else code


def _verdict(output: Path) -> int:
    """What became of a run whose processes have ended."""
    from .run import RunDirectory

    run = RunDirectory.attach(output)
    # In this order: who ends a run by force writes "stopped" before the request is taken back.
    asked, status = run.stop_requested(), run.status()
    if status.get("state") in ("finished", "stopped"):
        return FINISHED
    if asked and status.get("state") != "failed":
        run.write_status("stopped")
        return FINISHED
    if status.get("state") != "failed":
        run.write_status("failed", error="the processes of the run ended without a word; see the output above")
    print(f"failed: {run.status().get('error')}", file=sys.stderr)
    return BAD_INPUT if status.get("bad_input") else FAILED


def _quiet() -> None:
    """Keep the libraries' loading bars out of the run's own output."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _run_here(config: RunConfig, output: Path, arguments: list[str]) -> int:
    from .distributed import Processes
    from .run import RunDirectory

    processes = Processes(config.runtime.device)
    _quiet()
    run, fault = RunDirectory(output), None
    if processes.is_main:
        try:
            run = RunDirectory.open(output, config, arguments)
        except BadInput as error:
            fault = str(error)
    if fault := processes.broadcast(fault):
        raise BadInput(fault)
    try:
        return _train_in(config, run, processes)
    finally:
        if processes.is_main:
            run.release()
        processes.close()


def _train_in(config: RunConfig, run: "RunDirectory", processes: "Processes") -> int:  # noqa: F821 - imported late
    from .progress import Progress, closing

    summary = run.summary()
    if summary and summary["state"] == "finished":
        if processes.is_main:
            print(closing(summary, run))
        return FINISHED
    if processes.is_main:
        run.write_status(
            "starting",
            iteration=run.status().get("iteration", 0),
            iterations=config.runtime.iterations,
            error=None,
            bad_input=False,
            launcher=_launcher(),
        )
    try:
        from .loop import Trainer

        progress = Progress(config.runtime.iterations) if processes.is_main else None
        trainer = Trainer(config, run, processes, progress or (lambda event: None))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(trainer, "interrupted", True))
        summary = trainer.train()
    except BaseException as error:
        if processes.is_main:
            run.write_status("failed", error=_sentence(error), bad_input=isinstance(error, BadInput))
        raise
    if processes.is_main:
        progress.close()
        print(closing(summary, run))
    return FINISHED


def _launcher() -> int:
    """The process whose end ends the whole run: the launcher of several processes, else this one."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
