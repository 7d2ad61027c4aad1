"""The node of objectives: every option is a widget, whose default and whose choices the trainer takes."""

from collections.abc import Callable

import pytest


@pytest.mark.parametrize("name", ["grpo", "nft", "awm", "dpo", "reward-gradient"])
def test_untouched_widgets_are_the_objective_s_defaults(pack: Callable, name: str) -> None:
    node, objective = pack("nodes.objective"), pack("trainer.objectives").OBJECTIVES[name]
    widgets = {widget.id: widget for widget in node.widgets(objective)}
    assert widgets.keys() == objective.Options.model_fields.keys() - {"name"}
    untouched = {key: widget.default for key, widget in widgets.items()}
    assert node.section({"objective": name, **untouched}) == objective.Options().model_dump(mode="json")


def test_what_is_chosen_for_grpo_reaches_the_description(pack: Callable) -> None:
    chosen = {
        "ratio": "dppo",
        "divergence_limit": 3e-5,
        "clip": "plain",
        "step_weights": "flash",
        "kl_weight": 0.05,
        "kl_reference": "moving",
        "kl_share": 0.1,
    }
    widgets = {w.id: w for w in pack("nodes.objective").widgets(pack("trainer.objectives").OBJECTIVES["grpo"])}
    for key, value in chosen.items():
        if isinstance(value, str):
            assert value in widgets[key].options
        else:
            assert widgets[key].min <= value <= widgets[key].max
    section = pack("nodes.objective").section({"objective": "grpo", **chosen})
    assert {key: section[key] for key in chosen} == chosen


def test_an_objective_that_is_registered_at_run_time_is_a_choice_with_its_options(
    pack: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives, nft = pack("trainer.objectives").OBJECTIVES, pack("trainer.objectives.nft")
    options = type("MyOptions", (nft.NftOptions,), {"__annotations__": {"name": str}, "name": "mine"})
    monkeypatch.setitem(objectives, "mine", type("Mine", (nft.Nft,), {"name": "mine", "Options": options}))
    (combo,) = pack("nodes.objective").GRPOObjective.define_schema().inputs
    shown = {option.key: [widget.id for widget in option.inputs] for option in combo.options}
    assert "old_decay" in shown["mine"]
    assert pack("nodes.objective").section({"objective": "mine", "beta": 0.5})["beta"] == 0.5
