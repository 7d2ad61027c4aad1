"""Both branches of guidance: one call of the network where their shapes allow, two otherwise, and the same result."""

from typing import Any

import pytest
import torch
from tiny_graphs import CASES, Case, Trained, draw, entry, graph_model, new_patcher

NAMES = ("SD15", "SDXL", "SD3", "Flux", "ZImage", "QwenImage", "WAN21_T2V")
SCALE = 2.5


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.core == name)


def counted(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of each call of the network from now on."""
    calls, network = [], trained.model.module
    forward = network.forward

    def watched(x: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        calls.append(len(x))
        return forward(x, *given, **named)

    monkeypatch.setattr(network, "forward", watched)
    return calls


def branches(pack: Any, trained: Trained, tokens: int) -> tuple[Any, Any, Any, torch.Tensor, torch.Tensor]:
    """Conditions of three rows of two prompts, the negative prompt twice (alone, and for three rows), and latents."""
    conditions = pack("trainer.models").EntryConditions
    prompts = conditions.of([entry(trained.case, 1), entry(trained.case, 2)]).rows(torch.tensor([0, 1, 0]))
    negative = conditions.of([entry(trained.case, 3, tokens)])
    latents = torch.stack([draw(*trained.model.latent_shape, seed=seed) for seed in (4, 5, 6)])
    return prompts, negative, negative.rows(torch.zeros(3, dtype=torch.long)), latents, torch.tensor([0.7, 0.5, 0.3])


@pytest.mark.parametrize("name", NAMES)
def test_both_branches_are_one_call_and_equal_two(pack, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    trained = graph_model(pack, case_of(name), new_patcher(case_of(name)))
    trained.wake()
    prompts, negative, rows, latents, sigma = branches(pack, trained, tokens=6)
    model, calls = trained.model, counted(trained, monkeypatch)
    with torch.no_grad():
        alone, against = model.predict(latents, sigma, prompts), model.predict(latents, sigma, rows)
        assert sorted(calls) == [1, 2, 3]
        calls.clear()
        guided = model.predict_guided(latents, sigma, prompts, SCALE, negative)
    assert sorted(calls) == [2, 4], "each prompt's rows, with as many of the negative prompt"
    expected = against + SCALE * (alone - against)
    assert (guided - expected).abs().max() < 2e-5 * expected.abs().max()
    assert (expected - alone).abs().max() > 1e-3 * alone.abs().max(), "the negative prompt does nothing here"


def test_texts_of_other_lengths_take_one_more_call(pack, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = graph_model(pack, case_of("SD15"), new_patcher(case_of("SD15")))
    prompts, negative, rows, latents, sigma = branches(pack, trained, tokens=5)
    model, calls = trained.model, counted(trained, monkeypatch)
    with torch.no_grad():
        alone, against = model.predict(latents, sigma, prompts), model.predict(latents, sigma, rows)
        calls.clear()
        guided = model.predict_guided(latents, sigma, prompts, SCALE, negative)
    assert sorted(calls) == [1, 2, 3], "the negative prompt of all rows in one call"
    assert torch.equal(guided, against + SCALE * (alone - against))
