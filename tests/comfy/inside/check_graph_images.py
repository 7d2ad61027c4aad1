"""A conditioning for each prompt, with images of its own: from the node to the network."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import pytest
import torch
from stages import gradients_of, items_of, rollout_of
from tiny_graphs import CASES, Case, draw, entry, euler, graph_model, new_patcher
from tiny_networks import references
from torch import Tensor

STEPS = 4
QWEN, I2V = (next(case for case in CASES if case.core == core) for core in ("QwenImage", "WAN21_I2V"))


def carried_images(case: Case, number: int) -> dict:
    """What the images of a prompt put into its conditioning."""
    if case is QWEN:
        return references(1 + 2 * number)  # one for the first prompt, three of different sizes for the second
    frame = case.extra()
    return frame | {"concat_latent_image": frame["concat_latent_image"] + draw(1, 16, 2, 4, 6, seed=30 + number)}


def text(case: Case, seed: int, tokens: int) -> dict:
    return {"cross_attn": entry(case, seed, tokens)["cross_attn"]}


@pytest.mark.parametrize("tokens", [(6, 6), (5, 7)], ids=["texts of one length", "texts of other lengths"])
@pytest.mark.parametrize("case", [QWEN, I2V], ids=str)
def test_each_prompt_is_sampled_with_its_own_images_in_both_branches(
    pack: Callable, case: Case, tokens: tuple[int, int]
) -> None:
    trained, entries = graph_model(pack, case, new_patcher(case)), pack("trainer.models").EntryConditions
    own = [text(case, 1 + i, tokens[i]) | carried_images(case, i) for i in range(2)]
    negative = text(case, 3, 6)
    rollout = pack("trainer.rollout")
    prompting = rollout.Prompting(entries.of(own), entries.of([negative]))
    still = rollout.Plan("ode", 0.0, trained.plan.sigmas, [False] * STEPS, False, 2.0)
    comfy.model_management.in_training = True
    nothing, run = lambda step: None, rollout.Execution()
    ours = rollout.sample(trained.model, still, prompting, torch.arange(2), trained.noise, nothing, run).final
    patcher = new_patcher(case)
    sigmas = comfy.samplers.calculate_sigmas(patcher.model.model_sampling, "simple", STEPS)

    def core(i: int, seen: int) -> Tensor:
        opposite = negative | carried_images(case, seen)
        return euler(patcher, trained.noise[i : i + 1], sigmas, own[i], opposite, 2.0)

    for i in range(2):
        assert (ours[i] - core(i, i)[0]).abs().max() < 1e-5 * ours.abs().max()
        assert (ours[i] - core(i, 1 - i)[0]).abs().max() > 1e-3 * ours.abs().max(), "images do not matter here"

    comfy.model_management.in_training = True
    draws = lambda step: torch.stack([draw(*trained.noise.shape[1:], seed=100 * step + i) for i in range(2)])  # noqa: E731
    kept = rollout.sample(trained.model, trained.plan, prompting, torch.arange(2), trained.noise, draws, run)
    data = rollout_of(trained.plan, prompting, kept, torch.arange(2), [1.0, -1.0], pack)
    totals = trained.updater.accumulate(items_of(data, [(i, s) for i in range(2) for s in range(3)], pack), data)
    assert totals.peaks["deviation"] < 1e-6
    assert any(gradient.any() for gradient in gradients_of(trained.updater).values())


# ------------------------------------------------------------------------------------------------------------ the node


def given(prompts: list[str], held_out: list[str], conditioning: list, of_held_out: list | None = None) -> dict:
    found = {"prompts": ["\n".join(prompts)], "held_out_prompts": ["\n".join(held_out)], "conditioning": conditioning}
    return found if of_held_out is None else found | {"held_out_conditioning": of_held_out}


def part(seed: int, **extra: object) -> list:
    """A CONDITIONING."""
    return [[draw(1, 4, 8, seed=seed), {"reference_latents": [draw(1, 16, 2, 2, seed=seed)], **extra}]]


def test_one_conditioning_is_shared_and_several_are_one_for_each_prompt(pack: Callable) -> None:
    read, bad = pack("nodes.training").conditioning_of, pack("trainer.utils.errors").BadInput
    assert read(given(["a", "b"], ["c"], [])) is None
    shared = read(given(["a", "b"], ["c"], [part(1)]))
    assert shared.shared is not None
    assert not shared.is_own
    own = read(given(["a", "a"], ["c"], [part(1), part(2)], [part(3)]))
    assert own.is_own
    assert (len(own.training), len(own.held_out), own.shared) == (2, 1, None)
    assert read(given(["a"], ["c"], [part(1)], [part(2)])).is_own
    with pytest.raises(bad, match="conditioning has 3 entries and prompts has 2 lines: connect one for each line"):
        read(given(["a", "b"], [], [part(1), part(2), part(3)]))
    with pytest.raises(bad, match="held_out_conditioning has 0 entries and held_out_prompts has 1 lines"):
        read(given(["a", "b"], ["c"], [part(1), part(2)]))
    with pytest.raises(bad, match="conditioning must be connected"):
        read(given(["a", "b"], [], ["x", "y"]))


def test_a_text_may_occur_again_with_other_images_and_is_encoded_with_them(pack: Callable, tmp_path: Path) -> None:
    runs, encoding = pack("nodes.host.runs"), pack("nodes.host.encoding")
    config_module, sets = pack("trainer.config"), pack("trainer.prompts.sets")
    rewards = pack("nodes.types").Rewards((config_module.RewardConfig(name="brightness"),))
    graph = {"folder": "x", "file": "x", "vae_file": "x"}
    model = {"family": "comfy", "graph": graph, "height": 32, "width": 32}
    settings = {"rollout": {"guidance_scale": 2.0}}

    def described(prompts: str) -> dict:
        return runs.describe(model, settings, rewards, None, prompts, "at night", "grey", may_repeat=True)

    data = runs.described_apart(described("at night\nat night\nin rain"), ("abc", "def"))
    config = config_module.parse_config(data)
    training, held_out = sets.read_prompts(config)
    assert training.keys == [("at night", "abc-0"), ("at night", "abc-1"), ("in rain", "abc-2")]
    assert held_out.keys == [("at night", "def-0")]
    with pytest.raises(pack("trainer.utils.errors").BadInput, match="'at night' more than once"):
        runs.described_alike(described("at night\nat night"))
    assert runs.described_alike(described("at dusk"))["prompts"]["digests"] == []

    class Clip:
        """Text encoders that remember what they encode."""

        texts: list[str] = []

        def tokenize(self, text: str) -> str:
            self.texts.append(text)
            return text

        def encode_from_tokens_scheduled(self, tokens: str) -> list:
            return [[torch.zeros(1, 4, 8), {}]]

    seen = SimpleNamespace(penultimate_hidden_states=draw(1, 3, 8, seed=9))
    own = encoding.GraphConditioning(None, (part(1), part(2), part(3, clip_vision_output=seen)), (part(4),))
    file = tmp_path / "conditions.safetensors"
    encoding.write(file, Clip(), config, own)
    assert Clip.texts == ["grey"], "only the negative prompt has no conditioning of its own"
    stored = pack("trainer.prompts.store").open_conditions(file)
    rows = {key: stored.rows(torch.tensor([i])).entries[0] for i, key in enumerate(stored.keys)}
    for seed, key in enumerate([*training.keys, *held_out.keys], start=1):
        assert torch.equal(rows[key]["cross_attn"], draw(1, 4, 8, seed=seed))
        assert torch.equal(rows[key]["reference_latents"][0], draw(1, 16, 2, 2, seed=seed))
    assert "reference_latents" not in rows[("grey", "")]
    assert torch.equal(
        rows["in rain", "abc-2"]["clip_vision_output"]["penultimate_hidden_states"], draw(1, 3, 8, seed=9)
    )
