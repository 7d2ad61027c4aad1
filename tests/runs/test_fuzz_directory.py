"""200 damaged files of every kind that a run and a collection keep: sentences, the rest kept, and the run goes on."""

import json
import random
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import hostile
import pytest
import torch
from conftest import lora_of, write_description
from PIL import Image

from trainer.cli import main
from trainer.objectives.pairs import read_pairs
from trainer.runs import launch
from trainer.runs.directory import RunDirectory
from trainer.runs.events import last_events, read_evaluations
from trainer.runs.sample_grids import captioned, read_samples
from trainer.utils.documents import dump_yaml, parse_yaml
from trainer.utils.errors import BadInput, RunFailed
from trainer.votes import store
from trainer.votes.importing import export
from trainer.votes.records import Vote

FILES = [
    "run.yaml",
    "status.json",
    "events.jsonl",
    "evaluations.jsonl",
    "checkpoints/000003.safetensors",
    "lora.safetensors",
    "best.safetensors",
    "encoded-0.safetensors",
    "report/summary.json",
    "samples/evaluation_000003.json",
    "samples/rollout_000002.png",
    ".owner",
]
RUNS, COLLECTIONS = 132, 68
LOOKS = 5
"""Further damages to the same file that are only looked at: those who watch a run must bear what it does not."""


@pytest.fixture(scope="module")
def finished(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of three iterations in `run`, that was killed just before its end, and its description beside it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = tmp_path_factory.mktemp("finished")
    description = {
        "model": {"path": str(tiny_sd3), "height": 16, "width": 16},
        "prompts": {"texts": ["a red circle", "a blue square"]},
        "rollout": {"steps": 3, "shift": 1.0, "eta": 0.5, "group_size": 2, "prompts_per_iteration": 2},
        "rewards": [{"name": "brightness"}],
        "lora": {"rank": 4, "alpha": 8},
        "optimizer": {"learning_rate": 1e-3},
        "evaluation": {"texts": ["a green circle"], "images_per_prompt": 1, "every": 1},
        "runtime": {"iterations": 3, "device": "cpu", "samples_every": 1},
    }
    file = write_description(folder / "run.json", description)
    assert main(["train", str(file), "--output", str(folder / "run")]) == 0
    status = folder / "run" / "status.json"
    record = json.loads(status.read_text())
    record["launcher"]["created"] -= 1000  # a process that has ended, not this one
    status.write_text(json.dumps(record))
    yield folder
    for number, handler in handlers.items():
        signal.signal(number, handler)


def damage(file: Path, rng: random.Random) -> str:
    """Damage a file in one of many ways; says how."""
    kind = rng.choice(["bytes", "values", "values", "values", "gone", "folder"])
    content, suffix = file.read_bytes(), file.suffix or ".json"
    if kind == "values" and suffix in (".json", ".jsonl", ".yaml"):
        file.write_bytes(_other_values(content, suffix, rng))
    elif kind == "gone":
        file.unlink()
    elif kind == "folder" and rng.random() < 0.3:
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(hostile.damaged(content, rng))
    return kind


def _other_values(content: bytes, suffix: str, rng: random.Random) -> bytes:
    if suffix == ".yaml":
        return dump_yaml(hostile.mutated(parse_yaml(content.decode(), "it"), rng)).encode("utf-8", "surrogatepass")
    if suffix == ".json":
        return hostile.dump(hostile.mutated(json.loads(content), rng))
    lines = content.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = hostile.dump(hostile.mutated(json.loads(lines[place]), rng))
    return b"\n".join(lines) + b"\n"


def look(run: RunDirectory) -> None:
    """Everything that those who watch a run read of it."""
    run.status(), run.summary(), run.is_finished(), run.events(), launch.is_running(run)
    last_events(run.events_file, 5), read_evaluations(run.path / "evaluations.jsonl")
    for image in sorted((run.path / "samples").glob("*.png")):
        read_samples(image)
        try:
            captioned(image)
        except BadInput:
            assert image.name == "rollout_000002.png"
    try:
        run.config()
    except BadInput as error:
        assert len(str(error)) < 2_000


def assert_sentences(text: str, code: int) -> None:
    assert code in (0, 1, 2)
    assert not hostile.traceback_in(text), text
    assert not re.search(r"^failed: \w*(Error|Exception|Interrupt): ", text, re.MULTILINE), text
    assert "(details in" not in text
    for line in text.splitlines():
        assert len(line) < 3_000, "an error message is as long as the value it is about"


def sound_loras(run: Path) -> list[dict[str, torch.Tensor]]:
    found = []
    for path in run.rglob("*.safetensors"):
        if path.parent == run and path.is_file():
            try:
                found.append({name: value.clone() for name, value in lora_of(run, path.name).items()})
            except Exception:  # noqa: BLE001 - a damaged one
                continue
    return found


def holds(loras: list[dict[str, torch.Tensor]], lora: dict[str, torch.Tensor]) -> bool:
    return any(one.keys() == lora.keys() and all(torch.equal(one[k], lora[k]) for k in lora) for one in loras)


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_run_with_a_damaged_file_is_read_and_goes_on(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture, seed: int
) -> None:
    rng, run = random.Random(seed), RunDirectory(shutil.copytree(finished / "run", tmp_path / "run"))
    if seed % 2:
        (run.path / "report" / "summary.json").unlink()  # as if it had been killed before its end
    name = FILES[seed % len(FILES)]
    file = run.path / name
    if not file.exists():
        name, file = "status.json", run.path / "status.json"
    learned = {name: value.clone() for name, value in lora_of(run.path).items()}  # the file itself is mapped
    images = {p.name: p.read_bytes() for p in (run.path / "samples").glob("*.png")}
    sound = file.read_bytes()
    for _ in range(LOOKS):
        damage(file, rng)
        look(run)
        file.rmdir() if file.is_dir() else file.unlink(missing_ok=True)
        file.write_bytes(sound)
    how = damage(file, rng)
    kept = {p.name: p.read_bytes() for p in (run.path / "samples").glob("*.png") if p.is_file()}
    look(run)
    capfd.readouterr()
    for command in (["status", str(run.path)], ["stop", str(run.path)], ["resume", str(run.path)]):
        code = main(command)
        out, err = capfd.readouterr()
        assert_sentences(err if command[0] == "status" else out + err, code)  # its output is the file's content
        assert code == 0 or err.strip(), f"{name} {how}: {command[0]} ends with {code} and says nothing"
    # The original description repairs what can be repaired, and the run ends with its LoRA.
    code = main(["train", str(finished / "run.json"), "--output", str(run.path)])
    out, err = capfd.readouterr()
    assert_sentences(out + err, code)
    if how != "folder":
        assert code == 0, f"{name} {how}: {err}"
        assert holds(sound_loras(run.path), learned), f"{name} {how}: the LoRA is gone"
    now = {p.name: p.read_bytes() for p in (run.path / "samples").glob("*.png") if p.is_file()}
    assert kept.keys() <= now.keys() == images.keys() or name.startswith("samples") or how == "folder"


# --------------------------------------------------------------------------------------------------- votes


@pytest.fixture(scope="module")
def voted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of collections with one, `mine`, of five images and three votes."""
    root = tmp_path_factory.mktemp("votes")
    collection = store.create(root, "mine")
    added = collection.add(
        (Image.new("RGB", (8, 8), (40 * i, 80, 90)), f"a fox {i % 2}", "a test") for i in range(5)
    ).names
    votes = [Vote(added[i], added[i + 1], kind, f"vote-{i}") for i, kind in enumerate(["winner", "tie", "winner"])]
    collection.record(votes)
    collection.undo("undo-1", "vote-0")
    return root


@pytest.mark.parametrize("seed", range(COLLECTIONS))
def test_a_collection_with_a_damaged_file_keeps_the_rest(voted: Path, tmp_path: Path, seed: int) -> None:
    rng, root = random.Random(1000 + seed), Path(shutil.copytree(voted, tmp_path / "votes"))
    collection = store.find(root, "mine")
    names = sorted(collection.files())
    file = [collection.votes_file, collection.items_file, collection.images / names[0]][seed % 3]
    if file.suffix == ".csv" and rng.random() < 0.7:
        lines = file.read_text().splitlines()
        cells = lines[rng.randrange(len(lines))].split(",")
        cells[rng.randrange(len(cells))] = str(hostile.value(rng))[:50_000].replace("\n", " ")
        file.write_bytes("\n".join([*lines, ",".join(cells)]).encode("utf-8", "replace"))
    else:
        damage(file, rng)
    before = file.read_bytes() if file.is_file() else None
    try:
        vote_log, (items, complaints) = collection.vote_log(), collection.items()
        assert all(len(text) < 400 for text in [*vote_log.complaints, *complaints])
        with suppress(BadInput):  # too few pairs are left
            read_pairs(collection.folder)
        assert len(items) == len(collection.files()), "each image is there, whatever its line says"
        left = sorted(collection.files())
        new = Vote(left[-1], left[-2], "winner", f"after-{seed}")
        assert collection.record([new]) == 1
        assert new in collection.vote_log().votes
        assert set(vote_log.votes) <= set(collection.vote_log().votes), "a vote got lost by another one"
        export(collection, tmp_path / "mine.zip")
    except (BadInput, RunFailed, OSError) as error:
        assert not hostile.traceback_in(str(error))
        assert not file.is_file()  # a folder in its place
    if before is not None and file == collection.votes_file:
        assert file.read_bytes().startswith(before.rstrip(b"\n")[:200]) or b"better" not in before[:200]
