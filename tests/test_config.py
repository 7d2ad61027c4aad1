"""The run description: complete, strict, and its errors in one sentence."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from trainer.config import (
    RewardConfig,
    RolloutConfig,
    RunConfig,
    Section,
    parse_config,
    parse_sections,
    preset,
    preset_names,
    read_config,
)
from trainer.objectives import OBJECTIVES
from trainer.objectives.grpo import GrpoOptions
from trainer.rewards import reward_options
from trainer.utils.errors import BadInput

MINIMAL = {"prompts": {"texts": ["a red circle"]}, "rewards": [{"name": "brightness"}]}


def minimal(**sections: object) -> dict:
    return copy.deepcopy({**MINIMAL, **sections})


def sections() -> list[type[Section]]:
    """All sections of the trainer."""
    ours = [section for section in Section.__subclasses__() if section.__module__.startswith("trainer.")]
    return [*ours, *(objective.Options for objective in OBJECTIVES.values())]


def test_every_setting_has_a_description_and_a_default() -> None:
    without_default = set()
    for section in sections():
        for name, field in section.model_fields.items():
            nested = isinstance(field.default, BaseModel)
            if section is not RunConfig and not nested:
                assert field.description, f"{section.__name__}.{name}"
                assert field.description.endswith("."), f"{section.__name__}.{name}"
            if field.is_required():
                without_default.add(f"{section.__name__}.{name}")
    files = {"GraphModel.folder", "GraphModel.file", "GraphModel.vae_file", "GraphLora.file", "GraphExpert.file"}
    assert without_default == {"RewardConfig.name", "ObjectiveOptions.name"} | files


def test_minimal_description_is_enough() -> None:
    config = parse_config(minimal())
    assert config.rollout.group_size == 12
    assert config.prompts.texts == ["a red circle"]


FAULTS = {
    # what is changed, and what the sentence must hold: field, value, what is accepted
    "unknown key": ("rollout.etaa=1", ["rollout.etaa", "not a setting"]),
    "unknown section": ("rolout.eta=1", ["rolout", "not a setting"]),
    "word for a number": ("rollout.eta=much", ["rollout.eta", "'much'", "it must be a number"]),
    "fraction for a count": ("rollout.steps=5.5", ["rollout.steps", "5.5", "it must be a whole number"]),
    "number for a text": ("model.path=5", ["model.path", "5", "it must be text"]),
    "unknown choice": ("rollout.kernel=dpm", ["rollout.kernel", "'dpm'", "'dance'", "'cps'"]),
    "below range": ("rollout.steps=1", ["rollout.steps", "1", "it must be at least 2"]),
    "above range": ("optimizer.learning_rate=2", ["optimizer.learning_rate", "2", "it must be at most 1"]),
    "NaN": ("rollout.shift=.nan", ["rollout.shift", "nan", "finite number"]),
    "infinity": ("advantage.clip=.inf", ["advantage.clip", "inf", "finite number"]),
    "NaN in a nested section": ("runtime.watchdog.reward_drop=.nan", ["runtime.watchdog.reward_drop", "nan", "finite"]),
    "group of one": ("rollout.group_size=1", ["rollout.group_size", "1", "it must be at least 2"]),
    "eta 0": ("rollout.eta=0", ["rollout.eta", "0", "it must be above 0"]),
    "eta below 0": ("rollout.eta=-0.5", ["rollout.eta", "-0.5", "it must be above 0"]),
    "height not of the grid": ("model.height=63", ["model.height", "63", "multiple of 8"]),
    "no prompts": ("prompts.texts=[]", ["prompts", "exactly one of texts, file and shapes"]),
    "two sources": ("prompts.shapes=4", ["prompts", "exactly one of texts, file and shapes"]),
    "empty prompt": ("prompts.texts=[a circle, '  ']", ["prompts", "empty prompt"]),
    "duplicate prompt": ("prompts.texts=[a circle, a square, a circle]", ["prompts", "'a circle'", "more than once"]),
    "duplicate held-out prompt": ("evaluation.texts=[a, a]", ["evaluation", "more than once"]),
    "no rewards": ("rewards=[]", ["rewards", "nothing to learn"]),
    "the same reward twice": ("rewards=[{name: a}, {name: a}]", ["rewards", "more than once"]),
    "reward without a name": ("rewards=[{weight: 1}]", ["rewards.0.name", "missing"]),
    "odd best_of_n": ("advantage.best_of_n=3", ["advantage.best_of_n", "3", "multiple of 2"]),
    "one checkpoint": ("runtime.keep_checkpoints=1", ["runtime.keep_checkpoints", "1", "it must be at least 2"]),
    "section that is a number": ("rollout=5", ["rollout", "5", "it must be a section"]),
    "reward without its section": ("rewards=[brightness]", ["rewards.0", "'brightness'", "it must be a section"]),
    "section for a list": ("rewards={name: brightness}", ["rewards", "'name'", "it must be a list"]),
    "true for a count": ("runtime.iterations=true", ["runtime.iterations", "True", "it must be a number, not true"]),
    "true for a number": ("optimizer.learning_rate=true", ["optimizer.learning_rate", "it must be a number, not true"]),
    "true in a list of numbers": ("optimizer.betas=[true, 0.9]", ["optimizer.betas", "it must be a number, not true"]),
    "word for true": ("rollout.shared_noise=perhaps", ["'perhaps'", "it must be true or false"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_in_one_sentence(fault: str) -> None:
    setting, words = FAULTS[fault]
    with pytest.raises(BadInput) as raised:
        parse_config(minimal(), [setting])
    sentence = str(raised.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence
    assert ";" not in sentence.replace("a setting; check", ""), "one fault, one sentence"
    assert "pydantic" not in sentence


@pytest.mark.parametrize(
    ("section", "values", "start"),
    [
        ("model", {"family": "comfy"}, "model.graph is required for family 'comfy'"),
        ("rewards", [{"name": "shapes", "weight": "much"}], "rewards.0.weight is 'much': "),
        ("advantage", {"best_of_n": 3}, "advantage.best_of_n is 3: "),
        ("prompts", {"texts": ["a", "a"]}, "prompts"),
    ],
)
def test_a_message_names_its_field_once(section: str, values: object, start: str) -> None:
    with pytest.raises(BadInput) as raised:
        parse_sections({section: values})
    sentence = str(raised.value)
    assert sentence.startswith(start), sentence
    field = sentence.split(": ")[0].split(" ")[0]
    assert sentence.count(field) == 1, sentence


def test_an_option_of_a_reward_is_named_once() -> None:
    options = {"aspects": ["two words"], "instruction": "{prompt} {other}"}
    with pytest.raises(BadInput) as raised:
        reward_options(RewardConfig(name="mllm-rubric", options=options))
    sentence = str(raised.value)
    assert sentence.startswith("reward 'mllm-rubric': instruction has the placeholders other, prompt"), sentence
    assert "; aspects must be single words" in sentence, sentence


CONFLICTS = {
    "window too long": (["rollout.steps=5", "rollout.window.size=5"], ["rollout", "window of 5", "first 4 of 5 steps"]),
    "window starts too late": (
        ["rollout.steps=6", "rollout.window.size=2", "rollout.window.start=4"],
        ["rollout", "window of 2 from step 4", "first 5 of 6 steps"],
    ),
    "best_of_n above the group": (
        ["rollout.group_size=4", "advantage.best_of_n=6"],
        ["advantage.best_of_n 6", "rollout.group_size 4"],
    ),
    "updates that do not divide": (
        ["rollout.group_size=4", "rollout.prompts_per_iteration=3", "objective.updates=5"],
        ["objective.updates is 5", "prompts_per_iteration (3)", "trained images of a group (4)"],
    ),
    "updates against best_of_n": (
        ["rollout.group_size=6", "rollout.prompts_per_iteration=5", "advantage.best_of_n=4", "objective.updates=3"],
        ["objective.updates is 3", "prompts_per_iteration (5)", "trained images of a group (4)"],
    ),
    "cps renoising more than all": (
        ["rollout.kernel=cps", "rollout.eta=2"],
        ["rollout", "eta 2 ", "kernel cps", "0 to 1"],
    ),
}


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_settings_that_do_not_fit_together(conflict: str) -> None:
    settings, words = CONFLICTS[conflict]
    with pytest.raises(BadInput) as raised:
        parse_config(minimal(), settings)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_settings_at_the_edge_fit() -> None:
    edge = ["rollout.steps=5", "rollout.window.size=2", "rollout.window.start=2", "rollout.group_size=4"]
    config = parse_config(minimal(), [*edge, "advantage.best_of_n=4", "objective.updates=4"])
    assert config.advantage.best_of_n == config.rollout.group_size


def test_prompts_and_rewards_are_asked_for() -> None:
    with pytest.raises(BadInput, match="prompts is empty: .* in exactly one of texts, file and shapes"):
        parse_config({"rewards": MINIMAL["rewards"]})
    with pytest.raises(BadInput, match="rewards is empty"):
        parse_config({"prompts": MINIMAL["prompts"]})


def test_parts_of_a_description_validate_alone() -> None:
    assert RolloutConfig.model_validate({"steps": 4}).steps == 4
    found = parse_sections({"rollout": {"steps": 4}, "objective": {"updates": 3}}, ["rollout.eta=0.7", "lora.rank=2"])
    assert (found["rollout"].steps, found["rollout"].eta, found["objective"].updates) == (4, 0.7, 3)
    assert found["lora"].rank == 2
    assert isinstance(found["objective"], GrpoOptions)
    with pytest.raises(BadInput) as raised:
        parse_sections({"rollout": {"steps": 1}, "objective": {"clip_range": 2}})
    assert "rollout.steps is 1" in str(raised.value)
    assert "objective.clip_range is 2" in str(raised.value)
    with pytest.raises(BadInput, match="rolout is not a section"):
        parse_sections({"rolout": {}})


def test_objective_is_told_by_its_name() -> None:
    config = parse_config(minimal(objective={"name": "grpo", "clip_range": 1e-3}))
    assert config.objective == parse_config(minimal(), ["objective.clip_range=1e-3"]).objective
    assert parse_config(config.model_dump(mode="json")) == config
    assert yaml.safe_load(config.to_yaml())["objective"]["clip_range"] == 1e-3
    for value, words in (
        ("{name: grop}", "objective 'grop' is unknown: choose one of grpo"),
        ("{name: [grpo]}", "is unknown: choose one of grpo"),
        ("{clipping: 5}", "objective.clipping is not a setting"),
        ("{name: grpo, clip_range: 2}", "objective.clip_range is 2"),
        ("grpo", "objective must be a section such as {name: grpo}, but it is 'grpo'"),
        ("null", "objective must be a section such as {name: grpo}, but it is None"),
    ):
        with pytest.raises(BadInput) as raised:
            parse_config(minimal(), [f"objective={value}"])
        assert words in str(raised.value)


# ------------------------------------------------------------------------------------------------------ overrides


def test_settings_are_applied_in_order() -> None:
    settings = ["rollout.eta=0.7", "rewards.0.weight=-2", "model.path=other", "rollout.eta=0.9"]
    config = parse_config(minimal(), [*settings, "rollout.window.size=3"])
    assert (config.rollout.eta, config.rewards[0].weight, config.model.path) == (0.9, -2.0, "other")
    assert config.rollout.window.size == 3


def test_setting_reaches_into_a_section_that_is_null() -> None:
    config = parse_config(minimal(rollout={"window": None}), ["rollout.window.size=3"])
    assert config.rollout.window.size == 3


def test_setting_to_null_removes() -> None:
    data = minimal(rollout={"window": {"size": 3}})
    assert parse_config(data).rollout.window.size == 3
    assert parse_config(data, ["rollout.window=null"]).rollout.window is None
    assert data["rollout"]["window"] == {"size": 3}, "the caller's data is left alone"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("rollout.eta", ["'rollout.eta'", "section.field=value"]),
        ("rollout.eta=[1", ["rollout.eta", "'[1'", "neither YAML nor JSON"]),
        ("rollout.eta=[&a 1, *a]", ["rollout.eta", "'[&a 1, *a]'", "YAML alias in line 1, *a"]),
        ("rollout.eta=" + "9" * 5000, ["rollout.eta", "a number of 5000 digits"]),
        ("rewards.²=1", ["rewards.²", "index below 1"]),
        ("a." * 20_000 + "b=1", ["a.a.a", "more sections inside each other"]),
        ("rewards.3.weight=1", ["rewards.3.weight", "3", "index below 1"]),
        ("rewards.first.weight=1", ["rewards.first.weight", "first", "index below 1"]),
        ("prompts.texts.0.size=1", ["prompts.texts.0.size", "0", "not a section"]),
        ("=5", ["setting '=5'", "section.field=value"]),
        ("rollout.=5", ["setting 'rollout.=5'", "section.field=value"]),
        ("rollout.eta=", ["rollout.eta", "None", "it must be a number"]),
    ],
)
def test_malformed_setting(setting: str, words: list[str]) -> None:
    with pytest.raises(BadInput) as raised:
        parse_config(minimal(), [setting])
    assert all(word in str(raised.value) for word in words), str(raised.value)


# ---------------------------------------------------------------------------------------------------------- files


def test_yaml_round_trip(tiny_description: dict) -> None:
    tiny_description["prompts"]["texts"] = ["Grüße, 1: 'quoted'", "yes", "3.5", "- dash #no comment"]
    tiny_description["rollout"]["window"] = {"size": 2, "position": "moving", "every": 3}
    tiny_description["optimizer"] = {"learning_rate": 1e-5, "betas": [0.8, 0.99]}
    config = parse_config(tiny_description)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
    assert parse_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_numbers_as_yaml_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("prompts: {texts: [a circle]}\nrewards: [{name: brightness}]\noptimizer: {learning_rate: 1e-5}\n")
    assert read_config(file, ["objective.clip_range=1e-3"]).optimizer.learning_rate == 1e-5  # a text to YAML 1.1
    assert read_config(file, ["objective.clip_range=1e-3"]).objective.clip_range == 1e-3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot be read", "No such file"]),
        (b"rollout: [1", ["neither YAML nor JSON"]),
        (b"\xff\xfe\x00", ["is not UTF-8 text", "byte 1"]),
        (b"prompts: {shapes: 4, texts: &a [x], file: *a}", ["run.yaml", "YAML alias in line 1, *a"]),
        (
            b"prompts: {shapes: 4}\nrewards: []\nprompts: {shapes: 5}\n",
            ["has the key 'prompts' twice, again in line 3"],
        ),
        (b"", ["must be a mapping", "prompts"]),
        (b"- 1\n", ["must be a mapping", "prompts"]),
        (b"prompts: {texts: [2020-01-01, 3]}\nrewards: [{name: a}]\n", ["prompts.texts.1 is 3", "it must be text"]),
    ],
)
def test_unreadable_description(tmp_path: Path, content: bytes | None, words: list[str]) -> None:
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadInput) as raised:
        read_config(file)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_json_description_is_read_as_json(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"prompts": {"texts": ["a 🦊"]}, "rewards": [{"name": "brightness"}]}))
    assert "\\ud83e" in file.read_text()
    assert read_config(file).prompts.texts == ["a 🦊"]
    assert read_config(file, ['prompts.texts=["a \\ud83e\\udd8a fox"]']).prompts.texts == ["a 🦊 fox"]
    assert read_config(file, ["prompts.texts=[no, 12:30, 2020-01-01]"]).prompts.texts == ["no", "12:30", "2020-01-01"]
    with pytest.raises(BadInput, match=r"'a \\ud83e', which has an unpaired Unicode surrogate"):
        parse_config(minimal(prompts={"texts": ["a \ud83e"]}))


def test_values_in_messages_are_short() -> None:
    for setting in (f"rollout.kernel={'x' * 10**6}", f"{'x' * 10**6}=1", f"prompts.texts={['x' * 10**6] * 2}"):
        with pytest.raises(BadInput) as raised:
            parse_config(minimal(), [setting])
        assert len(str(raised.value)) < 500


def test_every_preset_is_a_complete_description() -> None:
    assert "demo" in preset_names()
    for name in preset_names():
        config = parse_config(preset(name))
        assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(BadInput, match=r"'nope' is unknown.*demo"):
        preset("nope")
