"""The command line; `python -m trainer --help` lists the commands."""

import argparse
import io
import json
import os
import sys
from pathlib import Path
from typing import TypeAlias

from .config import AUTO, RewardConfig, parse_config, preset, preset_names, read_config, read_mapping, settings
from .paths import with_absolute_paths
from .runs import launch
from .runs.directory import RunDirectory
from .train import BAD_INPUT, FAILED, FINISHED, run_description
from .utils.errors import BadInput, RunFailed, cut


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 finished or stopped on request, 1 failed, 2 bad input."""
    _make_printable()
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
        print(
            f"failed: {error.strerror or error}: {error.filename2 or error.filename or 'a file of the run'}",
            file=sys.stderr,
        )
        return FAILED


def _make_printable() -> None:
    """Escape characters that the console's encoding lacks, such as an emoji on Windows, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _parser() -> argparse.ArgumentParser:
    description = "Teach an image or video model what you like."
    parser = argparse.ArgumentParser(prog="python -m trainer", description=description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _run_commands(commands)
    _evaluation_commands(commands)
    _reward_commands(commands)
    _collect_arguments(commands)
    return parser


def _run_commands(commands: Commands) -> None:
    """Commands that train, and those about a run and its description."""
    train = commands.add_parser("train", help="train a LoRA from a run description")
    train.add_argument("description", type=Path, help="run description, YAML or JSON")
    train.add_argument("--output", type=Path, help="run directory; default runs/<name of the description>")
    _settings(train)
    train.add_argument("--processes", type=_positive, default=1, help="processes on this host (one per GPU)")
    train.set_defaults(run=_train)

    resume = commands.add_parser("resume", help="continue a run that was stopped or killed, or extend it")
    resume.add_argument("directory", type=Path)
    resume.add_argument("--iterations", type=_positive, help="extend the run to this many iterations in total")
    resume.add_argument("--processes", type=_positive, default=1)
    resume.set_defaults(run=_resume)

    status = commands.add_parser("status", help="print the state of a run as JSON")
    status.add_argument("directory", type=Path)
    status.set_defaults(run=_status)

    stop = commands.add_parser("stop", help="stop a run, which keeps its newest checkpoint and can be resumed")
    stop.add_argument("directory", type=Path)
    stop.set_defaults(run=_stop)

    demo = commands.add_parser("demo", help="train on the embedded model, without downloads")
    demo.add_argument("--output", type=Path, help="run directory; default runs/demo-<seed>")
    demo.add_argument("--seed", type=int, default=0)
    _settings(demo)
    demo.add_argument("--processes", type=_positive, default=1)
    demo.set_defaults(run=_demo)

    encode = commands.add_parser(
        "encode", help="encode a description's prompts, so that training loads no text encoder"
    )
    encode.add_argument("description", type=Path)
    encode.add_argument("--output", type=Path, required=True, help="file of conditions, .safetensors")
    _settings(encode)
    encode.set_defaults(run=_encode)

    presets = commands.add_parser("presets", help="list the presets, or print one as a run description")
    presets.add_argument("name", nargs="?", help="name of a preset; auto needs --for")
    presets.add_argument(
        "--for", type=Path, dest="description", metavar="FILE", help="a description whose settings auto chooses"
    )
    presets.set_defaults(run=_presets)


def _evaluation_commands(commands: Commands) -> None:
    """Commands that look at a description or at LoRAs without training."""
    estimate = commands.add_parser("estimate", help="estimate the memory and time of a run, without training")
    estimate.add_argument("description", type=Path, help="run description, YAML or JSON")
    _settings(estimate)
    estimate.add_argument("--processes", type=_positive, default=1, help="processes that will share the run")
    estimate.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    estimate.set_defaults(run=_estimate)

    evaluate = commands.add_parser("evaluate", help="score the base model and LoRAs on held-out prompts")
    evaluate.add_argument("description", type=Path, help="run description, YAML or JSON, or the directory of a run")
    evaluate.add_argument("loras", nargs="*", type=Path, metavar="LORA", help="LoRA file, or the directory of a run")
    evaluate.add_argument("--prompts", type=Path, help="file of held-out prompts, in place of the description's")
    evaluate.add_argument("--output", type=Path, help="folder for the results; default evaluations/<description>")
    _settings(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _reward_commands(commands: Commands) -> None:
    """Commands about a reward alone."""
    score = commands.add_parser("score", help="score image files with a reward")
    _reward_arguments(score)
    score.add_argument("images", nargs="+", type=Path)
    score.add_argument("--prompt", action="append", required=True, help="one for all images, or one for each")
    score.set_defaults(run=_score)

    server = commands.add_parser("reward-server", help="serve a reward to other programs and hosts")
    _reward_arguments(server)
    server.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all network interfaces")
    server.add_argument("--port", type=_port, default=8100)
    server.set_defaults(run=_reward_server)


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", dest="overrides")


def _collect_arguments(commands: Commands) -> None:
    collect = commands.add_parser("collect", help="put a run's samples into a collection of votes")
    collect.add_argument("directory", type=Path, help="run directory")
    collect.add_argument("collection", type=Path, help="folder of the collection; created if it does not exist")
    collect.add_argument("--kind", default="rollout", help="rollout (default) or evaluation")
    collect.add_argument("--iteration", type=int, help="of the samples; default the newest")
    collect.set_defaults(run=_collect)


def _reward_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reward", help="name of the reward")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", dest="options")
    parser.add_argument(
        "--files", type=Path, help="folder of the rewards' files; without it, give their paths with --set"
    )


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"{cut(text, 40)} is not a whole number of at least 1")
    return int(text)


def _port(text: str) -> int:
    if _positive(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: the largest is 65535")
    return int(text)


# ------------------------------------------------------------------------------------------------------------ commands


def _train(args: argparse.Namespace) -> int:
    config = read_config(args.description, args.overrides)
    output = args.output or Path("runs") / args.description.stem
    arguments = ["train", str(args.description), "--output", str(output), *_words(args.overrides)]
    return run_description(config, output, arguments, args.processes)


def _words(overrides: list[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def _resume(args: argparse.Namespace) -> int:
    config, arguments = RunDirectory.existing(args.directory).config(), ["resume", str(args.directory)]
    if args.iterations is not None:
        arguments += ["--iterations", str(args.iterations)]
        config = parse_config(config.model_dump(mode="json"), [f"runtime.iterations={args.iterations}"])
    return run_description(config, args.directory, arguments, args.processes)


def _demo(args: argparse.Namespace) -> int:
    config = parse_config(preset("demo"), [f"runtime.seed={args.seed}", *args.overrides], Path.cwd())
    output = args.output or Path("runs") / f"demo-{args.seed}"
    arguments = ["demo", "--seed", str(args.seed), "--output", str(output), *_words(args.overrides)]
    return run_description(config, output, arguments, args.processes)


def _status(args: argparse.Namespace) -> int:
    run = RunDirectory.existing(args.directory)
    print(json.dumps({**run.status(), "live": launch.is_running(run)}, indent=2))
    return FINISHED


def _stop(args: argparse.Namespace) -> int:
    run = RunDirectory.existing(args.directory)
    stopped = launch.stop(run)
    state = run.status().get("state", "never started")
    print(f"{'stopped' if stopped else 'was not running'}: {args.directory} ({state})")
    return FINISHED


def _estimate(args: argparse.Namespace) -> int:
    from .estimate.command import run_estimate
    from .utils.files import write_json

    forecast = run_estimate(read_config(args.description, args.overrides), args.processes)
    print(forecast.text())
    if args.json is not None:
        write_json(args.json, forecast.record())
    return FINISHED


def _evaluate(args: argparse.Namespace) -> int:
    from .evaluation.command import read_description, run_evaluation

    config = read_description(args.description, args.overrides, args.prompts)
    output = args.output or _unused(Path("evaluations") / args.description.resolve().stem)
    run_evaluation(config, args.loras, output)
    return FINISHED


def _unused(folder: Path) -> Path:
    """The folder, or one with a number added to its name, so that no results are overwritten."""
    number, free = 2, folder
    while free.exists():
        free, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return free


def _encode(args: argparse.Namespace) -> int:
    from .models import model_class
    from .prompts.conditions import encode_into, prompts_to_encode
    from .prompts.sets import read_prompts
    from .utils.console import quiet_libraries
    from .utils.distributed import Processes

    quiet_libraries()
    config = read_config(args.description, args.overrides)
    family = model_class(config.model)
    wanted = prompts_to_encode(config, *read_prompts(config), with_negative=True)
    encode_into(args.output, config, family, wanted, Processes(config.runtime.device).device, announce_from=0)
    print(f"{len(wanted)} prompts encoded into {args.output}; name it in prompts.conditions")
    return FINISHED


def _score(args: argparse.Namespace) -> int:
    from .rewards import load_reward
    from .score import score_files

    if len(args.prompt) not in (1, len(args.images)):
        raise BadInput(f"{len(args.prompt)} prompts for {len(args.images)} images: give one for all, or one for each")
    reward = load_reward(_reward_config(args), "cpu")
    reward.load()
    prompts = args.prompt * len(args.images) if len(args.prompt) == 1 else args.prompt
    code = FINISHED
    for path, prompt, result in zip(args.images, prompts, score_files(reward, args.images, prompts), strict=True):
        if isinstance(result, BadInput):
            print(f"error: {result}", file=sys.stderr)
            code = BAD_INPUT
        else:
            print(f"{result:.6f}\t{path}\t{' '.join(prompt.split())}")
    return code


def _reward_server(args: argparse.Namespace) -> int:
    from .rewards import load_reward
    from .rewards.remote.server import check_port, serve
    from .utils.distributed import Processes

    check_port(args.port)
    reward = load_reward(_reward_config(args))
    reward.load()
    return serve(reward, args.host, args.port, Processes("auto").device)


def _reward_config(args: argparse.Namespace) -> RewardConfig:
    from .rewards import with_files_from

    config = RewardConfig(name=args.reward, options=settings(args.options))
    return config if args.files is None else with_files_from(config, [args.files])


def _collect(args: argparse.Namespace) -> int:
    from .runs.vote_import import import_run
    from .votes import store

    folder = args.collection.absolute()
    collection = store.create(folder.parent, folder.name)
    done = import_run(collection, RunDirectory.existing(args.directory), args.kind, args.iteration)
    print(f"{done.new} images added to {folder}, {done.known} already in it")
    return FINISHED


def _presets(args: argparse.Namespace) -> int:
    if args.name is None:
        print("\n".join([AUTO, *preset_names()]))
    elif args.name == AUTO:
        print(_automatic(args.description), end="")
    elif args.description is not None:
        raise BadInput(f"--for is only for preset {AUTO}, not for {args.name}")
    else:
        print(parse_config(preset(args.name)).to_yaml(), end="")
    return FINISHED


def _automatic(path: Path | None) -> str:
    """A description with the settings that preset auto chooses for it, and its reasons as comments."""
    from .estimate.automatic import choose_for, filled

    if path is None:
        raise BadInput(f"preset {AUTO} chooses for a description: give one with --for FILE (model, prompts, rewards)")
    data = with_absolute_paths(read_mapping(path), path.parent)
    choice = choose_for(data)
    comments = "".join(f"# {line}\n" for line in choice.text().splitlines())
    return comments + parse_config(filled(data, choice)).to_yaml()
