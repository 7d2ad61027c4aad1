"""Prompt files: what they say, and one sentence for what is refused."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from trainer.config import EvaluationConfig, PromptsConfig, RunConfig, parse_config
from trainer.prompts.sets import PromptSet, evaluation_prompts, read_prompts, training_prompts
from trainer.utils.errors import BadInput


def read(path: Path) -> PromptSet:
    return training_prompts(PromptsConfig(file=str(path)))


def refused(path: Path, content: str | bytes, words: str) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    with pytest.raises(BadInput) as raised:
        read(path)
    assert words in str(raised.value)
    assert path.name in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def make_image(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path)
    return path


def run(prompts: dict, evaluation: dict | None = None) -> RunConfig:
    return parse_config({"prompts": prompts, "evaluation": evaluation or {}, "rewards": [{"name": "brightness"}]})


# --------------------------------------------------------------------------------------------------------- what is read


def test_every_form_says_the_same(tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    records = [{"prompt": "a, b", "image": "a.png", "category": "x"}, {"prompt": "c 🦊\u2028d "}]
    (tmp_path / "p.csv").write_text('prompt , image,category\r\n"a, b",a.png,x\r\nc 🦊\u2028d ,,\r\n', "utf-8-sig")
    (tmp_path / "p.jsonl").write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records), "utf-8")
    (tmp_path / "p.json").write_text(json.dumps(records, indent=2))
    sets = [read(tmp_path / f"p.{kind}") for kind in ("csv", "jsonl", "json")]
    assert sets[0] == sets[1] == sets[2]
    assert sets[0].texts == sets[0].scored == ["a, b", "c 🦊\u2028d"]
    assert (sets[0].categories, sets[0].images) == (["x", ""], [tmp_path / "a.png", None])


def test_a_text_file_and_a_list_of_texts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeff# of foxes\r\na fox\u2028in snow \r\n\r\n a dog\r\n".encode())
    (tmp_path / "p").write_text("a cat\n[red] a hat\n{x} and <y>\n")
    (tmp_path / "p.json").write_text('[\n  "a fox",\n  "a \\ud83e\\udd8a"\n]')
    assert read(tmp_path / "p.txt").texts == ["a fox\u2028in snow", "a dog"]
    assert read(tmp_path / "p").texts == ["a cat", "[red] a hat", "{x} and <y>"]
    assert read(tmp_path / "p.json").texts == ["a fox", "a 🦊"]


def test_prompts_in_a_description_are_cleaned() -> None:
    config = run({"texts": ["a cat ", "\ufeffa dog\x85"], "negative": " blurry\n"}, {"texts": ["a fox\u2028"]})
    assert (config.prompts.texts, config.prompts.negative) == (["a cat", "a dog"], "blurry")
    assert config.evaluation.texts == ["a fox"]
    with pytest.raises(BadInput, match="texts contains 'a cat' more than once"):
        run({"texts": ["a cat", "a cat "]})


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "", "contains no prompts"),
        ("p.txt", "# only\n# comments\n", "contains no prompts"),
        ("p.txt", "a fox\na dog\na  fox \n", "repeats the prompt 'a fox' (entries 1 and 3)"),
        ("p.txt", '[\n  "a",\n  "b"\n]', "contains JSON: rename it to .json"),
        ("p.txt", '{"prompt": "a"}\n{"prompt": "b"}', "contains JSON"),
        ("p.txt", '["a", "b"]', "contains JSON"),
        ("p.txt", "prompt,category\na,b\n", "begins with a CSV header: rename it to .csv"),
        ("p.txt", "prompt;category\na;b\n", "begins with a CSV header: rename it to .csv, with commas"),
        ("p.txt", "prompt\na\n", "begins with a CSV header"),
        ("p.txt", "prompts:\n  - a\n  - b\n", "contains YAML: remove its keys and dashes"),
        ("p.txt", "- a\n- b\n", "is a list with bullets: remove the bullets"),
        ("p.txt", "<!DOCTYPE html>\n<p>a</p>", "contains markup"),
        ("p.txt", "<?xml version='1.0'?><a/>", "contains markup"),
        ("p.txt", "{\\rtf1 a}", "contains markup"),
        ("p.txt", "a\0 \0f\0o\0x\0", "contains NUL characters: save it as UTF-8"),
        ("p.txt", "a fox".encode("utf-16"), "is not UTF-8 text"),
        ("p.txt", "ein Füchslein".encode("cp1252"), "is not UTF-8 text: byte 6 is not valid; save it as UTF-8"),
        ("p.yaml", "- a\n- b\n", "prompts are read from .txt (one per line), .csv, .jsonl and .json"),
        ("p.docx", b"PK\3\4", "prompts are read from .txt"),
        ("p.md", "* a\n", "prompts are read from .txt"),
        ("p.json", '{"prompts": ["a"]}', "is not a JSON list of prompts"),
        ("p.json", '["a", 3]', "entry 2 is not a JSON object with 'prompt'"),
        ("p.json", '["a",]', "is not JSON"),
        ("p.json", '["a \\ud83e"]', "contains 'a \\ud83e', which has an unpaired Unicode surrogate"),
        ("p.json", '[{"prompt": "a", "prompt": "b"}]', "has the key 'prompt' twice"),
        ("p.json", "[]", "contains no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n[]\n', "line 2 is not a JSON object with 'prompt'"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2 is not a JSON object with 'prompt'"),
        ("p.jsonl", '{"prompt": "a \\ud83e"}', "line 1 contains 'a \\ud83e', which has an unpaired Unicode surrogate"),
        ("p.jsonl", '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 nests lists and mappings"),
        ("p.jsonl", '{"prompt": ' + "9" * 5000 + "}", "line 1 contains a number of 5000 digits"),
        ("p.jsonl", '{"prompt": "a", "weight": ' + "9" * 5000 + "}", "line 1 contains a number of 5000 digits"),
        ("p.jsonl", '{\n "prompt": "a"\n}', "is one JSON text over several lines: rename it to .json"),
        ("p.jsonl", '{"prompt": "a\\u0000b"}', "line 1 contains 'a\\x00b', which has a NUL character: remove it"),
        ("p.csv", "prompt\na\0b\n", "line 2 contains 'a\\x00b', which has a NUL character"),
        ("p.txt", "caf\u00e9\ncafe\u0301\n", "repeats the prompt"),
        ("p.jsonl", '{"prompt": " "}', "'prompt' must be a non-empty string"),
        ("p.csv", '"prompt"x,category\na,b\n', "line 1 is not CSV"),
        ("p.csv", 'prompt,category\n"a"x,b\n', "line 2 is not CSV"),
        ("p.csv", "prompt\n" + "a" * 200_000, "line 2 is not CSV: field larger than"),
        ("p.csv", "prompt,prompt\na,b\n", "has the columns prompt, prompt"),
        ("p.csv", "prompt;category\na;b\n", "has the columns prompt;category"),
        ("p.csv", "", "has the columns (none): it needs prompt"),
        ("p.csv", "prompt\n", "contains no prompts"),
        ("p.csv", "prompt,image\na,none.png\n", "line 2: there is no image"),
        ("p.csv", "prompt,image\na,p.csv\n", "line 2: image"),
        ("p.jsonl", '{"prompt": "a", "image": "a\\u0000b"}', "line 1: there is no image"),
    ],
)
def test_what_is_not_a_list_of_prompts_is_refused(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    refused(tmp_path / name, content, words)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="none.txt cannot be read: No such file"):
        read(tmp_path / "none.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    for name in ("pipe.txt", "folder.txt"):
        with pytest.raises(BadInput, match=f"{name} is not a file"):
            read(tmp_path / name)


# ----------------------------------------------------------------------------------------------------- what is the same


def test_an_instruction_may_come_with_two_images_but_not_twice_with_one(tmp_path: Path) -> None:
    make_image(tmp_path / "a" / "1.png", "red"), make_image(tmp_path / "b" / "1.png", "blue")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a" / "1.png").read_bytes())
    lines = ["prompt,image", "make it green,a/1.png", "make it green,b/1.png"]
    (tmp_path / "p.csv").write_text("\n".join(lines))
    found = read(tmp_path / "p.csv")
    assert found.texts == ["make it green"] * 2
    assert len(set(found.keys)) == len({found.identity(i) for i in range(2)}) == 2
    assert all(len(digest) == 16 for digest in found.digests)
    for again in ("b/1.png", "copy.png"):  # by its content, under whatever name
        words = "repeats the prompt 'make it green' with the same image"
        refused(tmp_path / "q.csv", "\n".join([*lines, f"make it green ,{again}"]), words)


def test_a_prompt_without_an_image_is_identified_by_its_text_alone() -> None:
    prompts = PromptSet(["a", "b"], ["", ""])
    assert [prompts.identity(i) for i in range(2)] == [("a",), ("b",)]
    assert prompts.keys == [("a", ""), ("b", "")]
    assert (prompts.images, prompts.scored) == ([None, None], ["a", "b"])


def test_held_out_prompts_are_others(tmp_path: Path) -> None:
    for same in ("a cat", "a cat ", "a  cat", "\ufeffa cat"):
        (tmp_path / "held.txt").write_text(f"{same}\n", "utf-8")
        with pytest.raises(BadInput, match="held-out prompt 'a +cat' is also a training prompt"):
            read_prompts(run({"texts": ["a dog", "a cat"]}, {"file": str(tmp_path / "held.txt")}))
    training, held_out = read_prompts(run({"texts": ["a dog"]}, {"texts": ["a cat"]}))
    assert (training.texts, held_out.texts) == (["a dog"], ["a cat"])


def test_an_instruction_is_held_out_with_another_image(tmp_path: Path) -> None:
    for folder, color in (("train", "red"), ("test", "blue"), ("same", "red")):
        make_image(tmp_path / folder / "1.png", color)
        (tmp_path / folder / "p.csv").write_text("prompt,image\nmake it green,1.png\n")
    files = {folder: str(tmp_path / folder / "p.csv") for folder in ("train", "test", "same")}
    read_prompts(run({"file": files["train"]}, {"file": files["test"]}))
    with pytest.raises(BadInput, match="'make it green' is also a training prompt"):
        read_prompts(run({"file": files["train"]}, {"file": files["same"]}))


def test_rewards_get_the_words_without_weights_where_a_clip_has_applied_them() -> None:
    texts = ["a (red:1.5) fox", r"a \(fox\)"]
    weighted = run({"texts": texts, "weight_syntax": True, "negative": "(bad:2)"}, {"texts": ["((cat))"]})
    training, held_out = read_prompts(weighted)
    assert (training.texts, training.scored) == (texts, ["a red fox", "a (fox)"])
    assert (held_out.texts, held_out.scored) == (["((cat))"], ["cat"])
    plain, _ = read_prompts(run({"texts": texts}))
    assert plain.scored == texts
    for section in (
        {"texts": ["(" * 200 + "a" + ")" * 200]},
        {"texts": ["a"], "negative": "(" * 200 + "a" + ")" * 200},
    ):
        with pytest.raises(BadInput, match="has parentheses nested more than 100 deep"):
            read_prompts(run({**section, "weight_syntax": True}))


def test_the_world_of_shapes_holds_out_what_it_does_not_train_on() -> None:
    training, held_out = read_prompts(run({"shapes": 3}, {"shapes": 2}))
    assert training == training_prompts(PromptsConfig(shapes=3))
    assert held_out == evaluation_prompts(EvaluationConfig(shapes=2))
    assert len(training.texts) == len(training.categories) == 18
