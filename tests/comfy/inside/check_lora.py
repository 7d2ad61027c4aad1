"""A LoRA over a part of the schedule: against two models on two parts of the schedule."""

from types import SimpleNamespace

import comfy.samplers
import comfy.sd
import pytest
import torch

EVEN = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
SIGMAS = torch.tensor([3 * s / (1 + 2 * s) for s in EVEN])  # the demo model's schedule is shifted by 3
EULER = comfy.samplers.ksampler("euler")


def make_lora(seed: int) -> dict[str, torch.Tensor]:
    """Random, in the names the trainer writes for this family."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for block in range(2):
        for module in ("attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj"):
            name = f"transformer.transformer_blocks.{block}.{module}"
            lora[f"{name}.lora_A.weight"] = torch.randn(4, 192, generator=generator) * 0.2
            lora[f"{name}.lora_B.weight"] = torch.randn(192, 4, generator=generator) * 0.2
            lora[f"{name}.alpha"] = torch.tensor(4.0)
    return lora


@pytest.fixture(scope="module")
def lora() -> dict[str, torch.Tensor]:
    return make_lora(1)


@pytest.fixture(scope="module")
def whole(demo: SimpleNamespace, lora: dict) -> object:
    """The model with the LoRA on all the time, by core's own loader."""
    return comfy.sd.load_lora_for_models(demo.model, None, lora, 0.8, 0)[0]


def largest(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second).abs().max().item()


def in_parts(sample, demo, noise, parts, cfg=2.0) -> torch.Tensor:
    """Sample with one model after the other; each with its part of the schedule."""
    latent, start = torch.zeros_like(noise), noise
    for model, sigmas in parts:
        done = sample(EULER, sigmas, start, model=model, latent=latent, cfg=cfg)
        latent, start = demo.model.model.process_latent_out(done), torch.zeros_like(noise)
    return done


@pytest.mark.parametrize(
    ("start", "end", "splits"),
    [(0.0, 0.5, "LLLBB"), (0.5, 1.0, "BBBLL"), (0.3, 0.7, "BBLLB"), (0.0, 1.0, "LLLLL")],
)
def test_it_is_on_between_start_and_end(pack, demo, sample, noise, lora, whole, start, end, splits) -> None:
    # Before the shift a share p of the schedule lies at 1 - p; on while sigma(start) >= sigma.
    flags = {"L": whole, "B": demo.model}
    assert splits == "".join("L" if 1 - start >= s > 1 - end else "B" for s in EVEN[:-1])
    parts = [(flags[letter], SIGMAS[i : i + 2]) for i, letter in enumerate(splits)]
    scheduled = pack("nodes.lora").with_scheduled_lora(demo.model, lora, 0.8, start, end)
    for _ in range(2):  # a second sampling starts afresh
        done = sample(EULER, SIGMAS, noise, model=scheduled, cfg=2.0)
        assert largest(done, in_parts(sample, demo, noise, parts)) < 1e-4


def test_the_lora_changes_the_image_and_leaves_the_model_as_it_was(pack, demo, sample, noise, lora) -> None:
    before = sample(EULER, SIGMAS, noise)
    scheduled = pack("nodes.lora").with_scheduled_lora(demo.model, lora, 0.8, 0.2, 0.9)
    assert largest(sample(EULER, SIGMAS, noise, model=scheduled), before) > 1e-2
    assert torch.equal(sample(EULER, SIGMAS, noise), before)


def test_a_part_of_one_step_sampled_twice(pack, demo, sample, noise, lora) -> None:
    latent = demo.model.model.process_latent_out(noise * 0.5)
    scheduled = pack("nodes.lora").with_scheduled_lora(demo.model, lora, 0.8, 0.0, 0.5)
    base = sample(EULER, SIGMAS[3:5], noise, latent=latent)
    for _ in range(2):
        assert torch.equal(sample(EULER, SIGMAS[3:5], noise, latent=latent, model=scheduled), base)


def test_two_of_them_one_after_the_other(pack, demo, sample, noise, lora, whole) -> None:
    schedule = pack("nodes.lora").with_scheduled_lora
    other = make_lora(2)
    late = comfy.sd.load_lora_for_models(demo.model, None, other, 1.0, 0)[0]
    both = schedule(schedule(demo.model, lora, 0.8, 0.0, 0.5), other, 1.0, 0.5, 1.0)
    done = sample(EULER, SIGMAS, noise, model=both, cfg=2.0)
    assert largest(done, in_parts(sample, demo, noise, [(whole, SIGMAS[:4]), (late, SIGMAS[3:])])) < 1e-4


def test_the_plain_ksampler_takes_it_too(pack, demo, noise, lora) -> None:
    import comfy.sample

    scheduled = pack("nodes.lora").with_scheduled_lora(demo.model, lora, 0.8, 0.0, 0.5)
    conds = demo.encode("a red circle"), demo.encode("")

    def run(model: object) -> torch.Tensor:
        zero = torch.zeros_like(noise)
        return comfy.sample.sample(model, noise, 4, 2.0, "euler", "simple", *conds, zero, seed=1, disable_pbar=True)

    assert largest(run(scheduled), run(demo.model)) > 1e-2


def test_a_lora_of_another_model_is_refused(pack, demo) -> None:
    foreign = {"lora_unet_single_blocks_0_linear1.lora_up.weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match="none of its 1 tensors fits the model"):
        pack("nodes.lora").with_scheduled_lora(demo.model, foreign, 1.0, 0.0, 0.5)


def test_the_node_needs_a_lora(pack, demo) -> None:
    node = pack("nodes.lora").ApplyLoRAOverSigmas
    with pytest.raises(ValueError, match="connect a LORA_MODEL"):
        node.execute(demo.model, pack("nodes.lora").FROM_SOCKET, 1.0, 0.0, 0.8)
    with pytest.raises(ValueError, match="start_percent 0.8 must be below end_percent 0.2"):
        node.check_lazy_status(start_percent=0.8, end_percent=0.2)
    assert node.check_lazy_status(start_percent=0.2, end_percent=0.8) == ["model"]
    assert node.check_lazy_status(start_percent=0.2, end_percent=0.8, model=demo.model) == []
