"""The embedded model as it is committed."""

import pytest
import torch
from conftest import ROOT

from tools.pretrain_shapes import SHIFT, encode_texts
from trainer.config import ModelConfig, parse_config, preset
from trainer.diffusion.schedules import sigma_schedule
from trainer.models import SD3Model, model_class
from trainer.prompts.sets import evaluation_prompts, training_prompts
from trainer.rollout import Plan, Prompting, sample
from trainer.shapes import WEIGHTS
from trainer.shapes.checker import check
from trainer.shapes.prompts import TASKS
from trainer.utils.seeds import noise

CPU = torch.device("cpu")


def test_weights_are_small_and_hold_no_pickle() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}


def test_diffusers_makes_the_same_images_from_the_words() -> None:
    from diffusers import StableDiffusion3Pipeline

    texts = ["a red circle and a blue square", "three triangles"]
    config, steps = ModelConfig(), 10
    assert model_class(config) is SD3Model
    conditions = SD3Model.encode(config, [*texts, ""], CPU)
    model = SD3Model.load(config, CPU)
    initial = torch.stack([noise(model.latent_shape, 0, text) for text in texts])
    for guidance_scale in (1.0, 2.0):
        plan = Plan("ode", 0.0, sigma_schedule(steps, SHIFT), [False] * steps, False, guidance_scale)
        prompting = Prompting(conditions.rows(torch.tensor([0, 1])), conditions.rows(torch.tensor([2])))
        ours = model.decode(sample(model, plan, prompting, torch.arange(2), initial, lambda _: initial).final)
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            WEIGHTS, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
        )
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(
            texts,
            height=64,
            width=64,
            num_inference_steps=steps,
            sigmas=sigma_schedule(steps)[:-1],  # its scheduler shifts them
            guidance_scale=guidance_scale,
            max_sequence_length=0,
            latents=initial.clone(),
            output_type="pt",
        ).images
        assert (ours - theirs).abs().max() < 1e-3


def test_conditions_are_those_the_model_was_taught_with() -> None:
    texts = ["a red circle and a blue square", "a poster of four triangles", ""]
    conditions = SD3Model.encode(ModelConfig(), texts, CPU)
    states, pooled = encode_texts(texts)
    assert (conditions.tensors["embeds"] - states).abs().max() < 1e-5
    assert (conditions.tensors["pooled"] - pooled).abs().max() < 1e-5


def test_base_model_knows_the_world_and_often_errs() -> None:
    """A coarse bound with few images; the exact figures are in benchmarks/RESULTS.md."""
    config = parse_config(preset("demo"))
    prompts = evaluation_prompts(config.evaluation)
    assert set(prompts.categories) == set(TASKS)
    assert not set(prompts.texts) & set(training_prompts(config.prompts).texts)
    texts = prompts.texts[::2] + [""]
    conditions = SD3Model.encode(config.model, texts, CPU)
    model = SD3Model.load(config.model, CPU)
    rows = torch.arange(len(texts) - 1)
    prompting = Prompting(conditions.rows(rows), conditions.rows(torch.tensor([len(rows)])))
    steps = config.rollout.steps
    sigmas = sigma_schedule(steps, config.rollout.shift)
    plan = Plan("ode", 0.0, sigmas, [False] * steps, False, config.rollout.guidance_scale)
    initial = torch.stack([noise(model.latent_shape, 1, text) for text in texts[:-1]])
    images = model.decode(sample(model, plan, prompting, rows, initial, lambda _: initial).final)
    right = check(images, texts[:-1])[1].mean().item()
    assert 0.5 < right < 0.75


@pytest.mark.parametrize(
    ("known", "dtype"), [({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)], ids=["fast", "not"]
)
def test_automatic_type_of_the_vae_is_what_the_processor_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, known: dict, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    model = SD3Model.load(ModelConfig(vae_dtype="auto"), CPU)
    exact = SD3Model.load(ModelConfig(), CPU)
    assert model.vae.dtype == dtype
    latents = torch.stack([noise(model.latent_shape, 0, i) for i in range(2)])
    # In steps of the 256 values of an image.
    assert ((model.decode(latents) - exact.decode(latents)) * 255).abs().mean() < (
        1 if dtype == torch.bfloat16 else 1e-9
    )


def test_readme_shows_a_real_result() -> None:
    for name in ("before_after.png", "reward_curve.png"):
        assert (ROOT / "docs" / "images" / name).stat().st_size > 10_000
