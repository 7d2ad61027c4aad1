"""DPO on pairs that were voted on: its gradient against a transcription, and whole runs without rollout or reward."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import Forks, assert_same_tensors, results_of, run_program, write_description
from learning import assert_same_learning, newest_checkpoint
from PIL import Image
from torch import Tensor
from torch.func import functional_call

from trainer.config import parse_config
from trainer.loop import Trainer
from trainer.objectives import make_objective
from trainer.objectives.dpo import Dpo
from trainer.objectives.offline_dpo import OfflineDpo, fitted
from trainer.runs.directory import RunDirectory
from trainer.utils.distributed import Processes
from trainer.utils.errors import BadInput
from trainer.votes import store
from trainer.votes.records import Vote
from trainer.votes.store import Collection

BETA = 300.0


@pytest.fixture
def collection(tmp_path: Path) -> Collection:
    """Ten images of two prompts with seven pairs; the lighter one is better."""
    made = store.create(tmp_path, "light")
    shades = [(20 * i, 40 + 15 * i, 200 - 10 * i) for i in range(10)]
    images = made.add(
        (Image.new("RGB", (16, 16), shade), f"a {('red', 'blue')[i % 2]} circle", "") for i, shade in enumerate(shades)
    ).names
    pairs = [(9, 1), (8, 2), (7, 3), (6, 0), (5, 3), (4, 2), (8, 0)]
    made.record([Vote(images[a], images[b], id=str(number)) for number, (a, b) in enumerate(pairs)])
    made.record([Vote(images[0], images[4], "tie", "tie"), Vote(images[1], images[2], "winner", "prompts")])
    return made


@pytest.fixture
def offline(tiny_description: dict, collection: Collection) -> dict:
    data = copy.deepcopy(tiny_description)
    del data["prompts"], data["rewards"]
    data["objective"] = {"name": "dpo", "collection": str(collection.folder), "beta": BETA}
    data["rollout"] |= {"prompts_per_iteration": 4}
    data["evaluation"]["rewards"] = [{"name": "brightness"}]
    return data


def train(data: dict, path: Path | None = None) -> tuple[Trainer, list[dict]]:
    config, events = parse_config(data), []
    run = None if path is None else RunDirectory(path).open(config, [])
    trainer = Trainer(config, run, Processes("cpu"), events.append)
    try:
        trainer.train()
    finally:
        if run is not None:
            run.release()
    return trainer, [event for event in events if "objective" in event]


# ------------------------------------------------------------------------------------------------------- the gradient


def velocity(module: torch.nn.Module, weights: dict, images: Tensor, noise: Tensor, sigma: float, text: dict) -> Tensor:
    """What the network predicts for one noised image, in float64."""
    latents = ((1 - sigma) * images + sigma * noise)[None]
    inputs = {
        "hidden_states": latents,
        "timestep": torch.tensor([1000 * sigma], dtype=torch.float64),
        "encoder_hidden_states": text["embeds"][None],
        "pooled_projections": text["pooled"][None],
        "return_dict": False,
    }
    return functional_call(module, weights, (), inputs)[0][0]


@pytest.mark.parametrize("extra", [{}, {"winner_weight": 0.7, "kl_weight": 3.0}])
def test_the_gradient_is_that_of_a_transcription_in_float64(offline: dict, tiny_sd3: Path, extra: dict) -> None:
    from diffusers import SD3Transformer2DModel

    offline["objective"] |= extra
    trainer = Trainer(parse_config(offline), None, Processes("cpu"))
    generator = torch.Generator().manual_seed(0)
    parameters = trainer.policy.parameters
    for parameter in parameters.values():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    rollout = trainer.objective.collect(0)
    (items,) = trainer.objective.items(rollout)
    found = trainer.updater.gradient(items, rollout, 1.0, len(items))

    module = SD3Transformer2DModel.from_pretrained(tiny_sd3 / "transformer").double()
    learned = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    adapted = {}
    for name in {name.split(".lora_")[0] for name in learned}:
        down, up = (learned[f"{name}.lora_{part}.default.weight"] for part in "AB")
        adapted[f"{name}.weight"] = module.get_parameter(f"{name}.weight") + 8 / 4 * up @ down
    (batch,) = trainer.objective.batches(items, rollout)
    total = 0.0
    for row in range(4):
        text = {name: value[row].double() for name, value in rollout.prompting.conditions.tensors.items()}
        noise, sigma = batch.noise[row].double(), batch.sigma[row].double().item()
        images = [getattr(batch, side)[row].double() for side in SIDES]
        live, base = (
            [velocity(module, weights, image, noise, sigma, text) for image in images] for weights in (adapted, {})
        )
        gains = [
            ((v - (noise - image)) ** 2).mean() - ((b - (noise - image)) ** 2).mean()
            for v, b, image in zip(live, base, images, strict=True)
        ]
        total = total + torch.log(1 + torch.exp(BETA / 2 * (gains[0] - gains[1]))) / 4
        total = total + extra.get("winner_weight", 0.0) * ((live[0] - (noise - images[0])) ** 2).mean() / 4
        distance = sum(((v - b) ** 2).mean() for v, b in zip(live, base, strict=True)) / 2
        total = total + extra.get("kl_weight", 0.0) * distance / 4
    expected = torch.autograd.grad(total, list(learned.values()))
    flat, right = (torch.cat([g.flatten().double() for g in gradients]) for gradients in (found, expected))
    assert right.norm() > 1e-3
    assert (flat - right).norm() < 1e-4 * right.norm()


SIDES = ("winner", "loser")


def test_winner_and_loser_are_the_voted_images_of_one_prompt_at_one_noise(
    offline: dict, collection: Collection
) -> None:
    trainer = Trainer(parse_config(offline), None, Processes("cpu"))
    pairs = {(p.better, p.worse) for p in trainer.objective.data.pairs}
    assert len(pairs) == 7
    seen = set()
    for iteration in range(7):
        rollout = trainer.objective.collect(iteration)
        (items,) = trainer.objective.items(rollout)
        (batch,) = trainer.objective.batches(items, rollout)
        assert len(batch.winner) == len(batch.sigma) == len(batch.noise) == 4
        for row in range(4):
            seen.add((number_of(trainer, batch.winner[row]), number_of(trainer, batch.loser[row])))
    assert seen == pairs, "in seven iterations of four pairs each of seven pairs comes four times"


def number_of(trainer: Trainer, latents: Tensor) -> Path:
    (path,) = [path for path, known in trainer.objective._encoded.items() if torch.equal(known, latents)]
    return path


# ------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_without_rewards_learns_to_tell_the_pairs_apart_and_resumes_to_the_bit(
    offline: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    offline["runtime"] |= {"iterations": 6, "checkpoint_every": 1}
    trainer, events = train(offline, tmp_path / "whole")
    assert "dpo: 7 pairs of light; not used: 1 ties, 1 between images of different prompts" in capsys.readouterr().err
    records = [event["objective"] for event in events]
    assert [record["pairs"] for record in records] == [4] * 6
    assert records[0]["winner_error"] == records[0]["loser_error"] == 0, "the LoRA begins as the base model"
    assert records[-1]["winner_error"] < records[-1]["loser_error"]
    assert all(event["rewards"] == {} and event["grad_norm"] > 0 for event in events)
    assert events[0]["forwards_per_image"] == 2, "with the LoRA and without"
    summary = RunDirectory(tmp_path / "whole").summary()
    assert summary["eval"]["before"]["rewards"]["brightness"] is not None
    train(offline | {"runtime": offline["runtime"] | {"iterations": 3}}, tmp_path / "parted")
    train(offline, tmp_path / "parted")
    whole, parted = (newest_checkpoint(tmp_path / name) for name in ("whole", "parted"))
    assert_same_tensors(whole, parted)
    assert trainer.policy.updates == 6


def test_votes_that_changed_since_a_run_was_stopped_are_not_mixed_into_it(
    offline: dict, collection: Collection, tmp_path: Path
) -> None:
    train(offline, tmp_path / "run")
    collection.undo("u", "6")
    offline["runtime"]["iterations"] += 1
    with pytest.raises(BadInput, match="votes of light have changed since this run was stopped"):
        train(offline, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(offline: dict, program: Forks, tmp_path: Path) -> None:
    offline["rollout"]["prompts_per_iteration"] = 5
    del offline["lora"]["ema_decay"]
    offline["runtime"] |= {"iterations": 3}
    file = write_description(tmp_path / "run.json", offline)
    code, output = program.run("train", file, "--output", tmp_path / "one")
    assert code == 0, output
    done = run_program("train", file, "--output", tmp_path / "two", "--processes", 2, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("7 pairs of light") == 1, "only the first process speaks"
    alone, shared = results_of(tmp_path / "one"), results_of(tmp_path / "two")
    for ours, theirs in zip(alone, shared, strict=True):
        assert ours["objective"]["pairs"] == theirs["objective"]["pairs"] == 5
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert_same_learning(newest_checkpoint(tmp_path / "one"), newest_checkpoint(tmp_path / "two"))


# ----------------------------------------------------------------------------------------------------- what is refused


def test_the_collection_decides_which_objective_it_is(offline: dict, tiny_description: dict) -> None:
    assert type(make_objective(parse_config(offline))) is OfflineDpo
    tiny_description["objective"] = {"name": "dpo"}
    assert type(make_objective(parse_config(tiny_description))) is Dpo
    del tiny_description["rewards"]
    with pytest.raises(BadInput, match="rewards is empty"):
        parse_config(tiny_description)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompts": {"texts": ["a"]}}, "the prompts come from objective.collection: remove"),
        ({"rewards": [{"name": "brightness"}]}, "belong in evaluation.rewards"),
        ({"rollout": {"prompts_per_iteration": 4}, "objective.updates": 3}, "updates 3 does not divide"),
        ({"model.frames": 5}, "set it to 1"),
    ],
)
def test_what_does_not_go_with_a_collection_is_refused(offline: dict, change: dict, says: str) -> None:
    for key, value in change.items():
        section, _, field = key.partition(".")
        if field:
            offline[section][field] = value
        else:
            offline[section] = value
    with pytest.raises(BadInput, match=says):
        parse_config(offline)


def test_more_processes_than_pairs_and_a_missing_collection_are_refused(offline: dict) -> None:
    from trainer.check import check_run

    with pytest.raises(BadInput, match="5 processes are more than the 4 pairs of an iteration"):
        check_run(parse_config(offline), 5)
    offline["objective"]["collection"] += "x"
    with pytest.raises(BadInput, match="not a collection of votes"):
        check_run(parse_config(offline), 1)


def test_an_image_that_is_damaged_behind_its_header_is_named(offline: dict, collection: Collection) -> None:
    name = collection.vote_log().votes[0].better
    file = collection.images / name
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(BadInput, match=f"objective.collection: .*{name}"):
        Trainer(parse_config(offline), None, Processes("cpu"))


def test_images_of_another_size_cover_the_model_s_and_keep_their_middle(tmp_path: Path) -> None:
    wide = Image.new("RGB", (64, 16), (255, 0, 0))
    wide.paste((0, 255, 0), (24, 0, 40, 16))
    wide.save(tmp_path / "wide.png")
    found = fitted(tmp_path / "wide.png", 32, 32)
    assert found.shape == (3, 32, 32)
    assert found[1, :, 8:24].min() > 0.99
    assert found[0, :, 8:24].max() < 0.01
