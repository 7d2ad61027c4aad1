"""Starting from a LoRA file: the same change of every layer, or a sentence."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.adapters.lora import comfy_weights
from trainer.adapters.start import check_start, start_weights
from trainer.config import LoraConfig
from trainer.models.base import FusedRows
from trainer.utils.errors import BadInput

IN, OUT, RANK, ALPHA = 6, 5, 4, 8.0
MODULES = ["blocks.0.attn.to_q", "blocks.0.attn.to_k"]


def fresh(modules: list[str] = MODULES) -> dict[str, Tensor]:
    """Untrained weights: the product is 0."""
    torch.manual_seed(0)
    weights = {}
    for module in modules:
        weights[f"{module}.lora_A.default.weight"] = torch.randn(RANK, IN)
        weights[f"{module}.lora_B.default.weight"] = torch.zeros(OUT, RANK)
    return weights


def learned() -> dict[str, Tensor]:
    return {name: torch.randn_like(value) for name, value in fresh().items()}


def change(weights: dict[str, Tensor], module: str, scale: float = ALPHA / RANK) -> Tensor:
    """What the LoRA adds to a layer's weight."""
    down, up = (weights[f"{module}.lora_{side}.default.weight"] for side in "AB")
    return scale * up @ down


def plain_key(module: str) -> str:
    return f"transformer.{module}"


def start(path: Path, key: object = plain_key, modules: list[str] = MODULES, **lora: object) -> dict[str, Tensor]:
    config = LoraConfig(rank=RANK, alpha=ALPHA, start_from=str(path), **lora)
    check_start(config)
    return start_weights(config, modules, key, lambda module: [f"native.{module}"], fresh(modules))


def test_the_file_of_the_export_gives_the_weights_back(tmp_path: Path) -> None:
    weights = learned()
    save_file(comfy_weights(weights, ALPHA, plain_key), tmp_path / "a.safetensors")
    started = start(tmp_path / "a.safetensors")
    assert started.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(started[name], value), name


def test_a_layer_that_comfyui_keeps_in_one_piece_is_divided_again(tmp_path: Path) -> None:
    rows = {module: FusedRows("diffusion_model.blocks.0.qkv", OUT * i, 2 * OUT) for i, module in enumerate(MODULES)}
    weights = learned()
    save_file(comfy_weights(weights, ALPHA, rows.__getitem__), tmp_path / "a.safetensors")
    started = start(tmp_path / "a.safetensors", rows.__getitem__)
    for module in MODULES:
        torch.testing.assert_close(change(started, module), change(weights, module))


FORMS = [
    ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", "transformer.{}.alpha"),
    ("transformer.{}.lora_down.weight", "transformer.{}.lora_up.weight", "transformer.{}.alpha"),
    ("diffusion_model.{}.lora_A.default.weight", "diffusion_model.{}.lora_B.default.weight", None),
    ("unet.{}_lora.down.weight", "unet.{}_lora.up.weight", None),
    ("{}.lora.down.weight", "{}.lora.up.weight", None),
    ("native.{}.lora_linear_layer.down.weight", "native.{}.lora_linear_layer.up.weight", None),
    ("base_model.model.{}.lora_A", "base_model.model.{}.lora_B", None),
    ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
    ("lora_transformer_{}.lora_down.weight", "lora_transformer_{}.lora_up.weight", "lora_transformer_{}.alpha"),
]


@pytest.mark.parametrize(("down", "up", "alpha"), FORMS, ids=[form[0] for form in FORMS])
def test_other_names_ranks_and_alphas_change_every_layer_by_the_same(
    tmp_path: Path, down: str, up: str, alpha: str | None
) -> None:
    tensors, expected = {}, {}
    for module in MODULES:
        name = module.replace(".", "_") if "{}" in down and down.startswith("lora_") else module
        first, second = torch.randn(2, IN), torch.randn(OUT, 2)
        tensors |= {down.format(name): first, up.format(name): second}
        if alpha:
            tensors[alpha.format(name)] = torch.tensor(3.0)
        expected[module] = second @ first * (3.0 / 2 if alpha else 1.0)  # without an alpha ComfyUI applies factor 1
    save_file(tensors, tmp_path / "a.safetensors")
    started = start(tmp_path / "a.safetensors")
    for module in MODULES:
        torch.testing.assert_close(change(started, module), expected[module])
        spare = started[f"{module}.lora_A.default.weight"][2:]
        assert torch.equal(spare, fresh()[f"{module}.lora_A.default.weight"][2:]), "rows of a higher rank stay fresh"


def test_half_precision_and_1x1_convolutions_are_read(tmp_path: Path) -> None:
    first, second = torch.randn(2, IN).half(), torch.randn(OUT, 2).half()
    name = plain_key(MODULES[0])
    tensors = {f"{name}.lora_down.weight": first[:, :, None, None].contiguous(), f"{name}.lora_up.weight": second}
    save_file(tensors, tmp_path / "a.safetensors")
    started = start(tmp_path / "a.safetensors")
    torch.testing.assert_close(change(started, MODULES[0]), second.float() @ first.float())
    assert torch.equal(change(started, MODULES[1]), torch.zeros(OUT, IN)), "what the file does not hold stays fresh"
    assert all(value.dtype == torch.float32 for value in started.values())


def test_a_convolutions_lora_is_read_at_another_rank(tmp_path: Path) -> None:
    name, module = plain_key("conv1"), "conv1"
    first, second = torch.randn(2, IN, 3, 3), torch.randn(OUT, 2, 1, 1)
    tensors = {f"{name}.lora_down.weight": first, f"{name}.lora_up.weight": second, f"{name}.alpha": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    untrained = {f"{module}.lora_A.default.weight": torch.randn(RANK, IN, 3, 3)}
    untrained[f"{module}.lora_B.default.weight"] = torch.zeros(OUT, RANK, 1, 1)
    config = LoraConfig(rank=RANK, alpha=ALPHA, start_from=str(tmp_path / "a.safetensors"))
    started = start_weights(config, [module], plain_key, lambda module: [], untrained)
    assert {key: value.shape for key, value in started.items()} == {key: v.shape for key, v in untrained.items()}
    down, up = started.values()
    images = torch.randn(2, IN, 8, 8)
    ours = torch.nn.functional.conv2d(torch.nn.functional.conv2d(images, down), up) * ALPHA / RANK
    theirs = torch.nn.functional.conv2d(torch.nn.functional.conv2d(images, first), second) * 3.0 / 2
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def pair(name: str, rank: int = 2, width: int = IN) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(rank, width), f"{name}.lora_B.weight": torch.ones(OUT, rank)}


GOOD = pair(plain_key(MODULES[0]))
REFUSED = {
    "no LoRA": ({"weight": torch.ones(2, 2)}, "contains 'weight', which is not part of a plain LoRA or LoCon"),
    "nothing": ({}, "contains no LoRA"),
    "DoRA": (GOOD | {"transformer.a.dora_scale": torch.ones(2)}, "contains 'transformer.a.dora_scale', which is not"),
    "one matrix": (
        {"transformer.a.lora_A.weight": torch.ones(2, IN)},
        "contains only one of the two matrices of layer 'transformer.a'",
    ),
    "another module": (GOOD | pair("transformer.other"), "changes 1 layers that this run does not train, such as"),
    "text encoder": (GOOD | pair("lora_te1_x"), "changes 1 layers that this run does not train, such as 'lora_te1_x'"),
    "rank": (pair(plain_key(MODULES[0]), rank=8), "has rank 8, which is above lora.rank 4: raise lora.rank to 8"),
    "size": (pair(plain_key(MODULES[0]), width=7), "maps 7 to 5, not 6 to 5: it belongs to another model"),
    "NaN": (GOOD | {next(iter(GOOD)): torch.full((2, IN), float("nan"))}, "is not a finite matrix"),
    "integers": (GOOD | {next(iter(GOOD)): torch.ones(2, IN, dtype=torch.int64)}, "is not a finite matrix"),
    "ranks": (GOOD | {next(iter(GOOD)): torch.ones(3, IN)}, "have different ranks"),
    "convolution": (GOOD | {next(iter(GOOD)): torch.ones(2, IN, 3, 3)}, "maps 54 to 5, not 6 to 5"),
    "Tucker": (GOOD | {"transformer.a.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "which is not part of a plain LoRA"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_other_files_are_refused_in_one_sentence(tmp_path: Path, fault: str) -> None:
    tensors, words = REFUSED[fault]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(BadInput) as raised:
        start(tmp_path / "a.safetensors")
    assert str(raised.value).startswith(f"lora.start_from: {tmp_path / 'a.safetensors'}")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    for content, words in ((None, "there is no file"), (b"not a LoRA", "is not a safetensors file"), (b"", "is not a")):
        path = tmp_path / "a.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BadInput, match=words):
            check_start(LoraConfig(start_from=str(path)))
    check_start(LoraConfig())
