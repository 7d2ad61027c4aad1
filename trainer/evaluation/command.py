"""`python -m trainer evaluate`: the base model and LoRAs on a description's held-out prompts."""

from collections.abc import Callable
from pathlib import Path

from ..check import CheckedRun, check_run
from ..config import RunConfig, parse_config, read_config
from ..evaluate import Evaluator
from ..paths import with_absolute_paths
from ..prompts.conditions import conditions_for
from ..rollout import Execution, Prompting
from ..runs.directory import RunDirectory
from ..utils.console import quiet_libraries
from ..utils.distributed import Processes
from ..utils.errors import BadInput
from ..utils.files import write_atomically, write_json
from ..utils.media import save_image
from ..utils.precision import tf32
from .comparison import ModelScores, compared, text_table
from .embedding import embedder
from .files import BASE, Adapters, LoraFile, check_fit, lora_files
from .paper_table import paper_table
from .sheet import contact_sheet

FILES = ("comparison.json", "comparison.txt", "contact_sheet.png")


def read_description(path: Path, overrides: list[str], prompts: Path | None) -> RunConfig:
    """Read a description from a file or a run directory; a file of `prompts` replaces its held-out prompts.

    Raises:
        BadInput: it cannot be read, or has no held-out prompts.
    """
    if prompts is not None:
        absolute = with_absolute_paths({"evaluation": {"file": str(prompts)}}, Path.cwd())["evaluation"]["file"]
        overrides = ["evaluation.texts=[]", "evaluation.shapes=null", f"evaluation.file={absolute}", *overrides]
    if path.is_dir():
        config = parse_config(RunDirectory.existing(path).config().model_dump(mode="json"), overrides, Path.cwd())
    else:
        config = read_config(path, overrides)
    evaluation = config.evaluation
    if not (evaluation.texts or evaluation.file or evaluation.shapes):
        raise BadInput("the description has no held-out prompts: give them with --prompts FILE or in evaluation")
    return config


def run_evaluation(config: RunConfig, paths: list[Path], output: Path, say: Callable[[str], None] = print) -> dict:
    """Score the base model and each LoRA, and write the table, the statistics and the contact sheet.

    Args:
        paths: LoRA files, or directories of runs.
        output: folder for the results; must not contain other results.

    Returns:
        the statistics, as in comparison.json.

    Raises:
        BadInput: an input cannot be used. What does not depend on weights is checked before any are loaded.
    """
    if any((output / name).exists() for name in FILES):
        raise BadInput(f"--output {output} holds the results of another evaluation: name another folder")
    quiet_libraries()
    files = lora_files(paths)
    checked = check_run(config, 1)
    check_fit(checked.family, config, files)
    with tf32(config.runtime.tf32):
        models = score_models(config, checked, files, say)
    record = {**compared(models), "seed": config.evaluation.seed}
    record["files"] = {file.name: str(file.path.resolve()) for file in files}
    record["paper"] = paper_table(record, [*config.rewards, *config.evaluation.rewards])
    table = text_table(record)
    write_json(output / FILES[0], record)
    write_atomically(output / FILES[1], f"{table}\n".encode())
    save_image(output / FILES[2], contact_sheet(models))
    say(f"\n{table}\n\n" + "\n".join(str(output / name) for name in FILES))
    return record


def score_models(
    config: RunConfig, checked: CheckedRun, files: list[LoraFile], say: Callable[[str], None]
) -> list[ModelScores]:
    """The base model, then the LoRAs."""
    processes, held_out = Processes(config.runtime.device), checked.held_out
    for reward in checked.all_rewards.values():
        reward.load()
    found = conditions_for(config, checked.family, held_out, held_out, processes, None)
    unconditional = None if found.unconditional is None else found.unconditional.to(processes.device)
    model = checked.family.load(config.model, processes.device)
    adapters = Adapters(model, files)
    prompting, execution = Prompting(found.held_out, unconditional), Execution(config.rollout.batch_size)
    evaluator = Evaluator(config, checked, model, prompting, processes, execution, embedder(checked.all_rewards))
    first, models = None, []
    for file in (None, *files):
        adapters.use(file)
        result = evaluator.evaluate(first)
        first = first or result.record()
        name = BASE if file is None else file.name
        models.append(ModelScores(name, result.scores, result.looks, result.images, result.samples))
        say(f"{name}: " + ", ".join(f"{n} {v:.4f}" for n, v in result.rewards.items() if v is not None))
    return models
