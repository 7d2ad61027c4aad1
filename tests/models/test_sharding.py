"""What each process reads of a divided network is its part of what diffusers loads."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import CASES

from trainer.config import ModelConfig
from trainer.models import FAMILIES
from trainer.models.diffusers import sharding

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A group of this process alone, whose part is everything."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def in_several_files(folder: Path) -> None:
    """The same weights in two files and an index, as large networks have them."""
    whole = load_file(folder / sharding.WEIGHTS)
    names, files = sorted(whole), ("first.safetensors", "second.safetensors")
    parts = [names[::2], names[1::2]]
    for file, part in zip(files, parts, strict=True):
        save_file({name: whole[name] for name in part}, folder / file)
    placed = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / f"{sharding.WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / sharding.WEIGHTS).unlink()


@pytest.mark.parametrize("name", ["sd", "wan", "qwen-image"])
@pytest.mark.usefixtures("group")
def test_a_divided_network_has_the_weights_dtypes_and_buffers_of_a_whole_one(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    case.build(tmp_path)
    config = ModelConfig(family=case.family, path=str(tmp_path), dtype="bfloat16", **case.model)
    family, folder = FAMILIES[case.family], tmp_path / FAMILIES[case.family].component
    model = family.load(config, CPU)
    whole = model.module
    if name == "wan":
        in_several_files(folder)
    divided = sharding.load_sharded(family.network_class, folder, torch.bfloat16, CPU)
    kinds = {value.dtype for value in whole.parameters()}
    assert kinds == ({torch.bfloat16, torch.float32} if name == "wan" else {torch.bfloat16})
    found = dict(divided.named_parameters())
    assert list(found) == [key for key, _ in whole.named_parameters()]
    for key, value in whole.named_parameters():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key].to_local(), value), key
        assert not found[key].requires_grad
    for key, value in whole.named_buffers():
        assert torch.equal(divided.get_buffer(key), value), key
    assert not divided.training
    conditions = family.empty_conditions(config, 1, CPU)
    latents, sigma = torch.ones(1, *model.latent_shape), torch.tensor([0.5])
    with torch.no_grad():
        expected = model.predict(latents, sigma, conditions)
        assert torch.equal(family(divided, model.vae, config).predict(latents, sigma, conditions), expected)


@pytest.mark.usefixtures("group")
def test_other_names_are_left_to_diffusers(tmp_path: Path) -> None:
    case = CASES["sd"]
    case.build(tmp_path)
    file = tmp_path / "unet" / sharding.WEIGHTS
    save_file({name.replace("to_q", "query"): value for name, value in load_file(file).items()}, file)
    assert sharding.load_sharded("UNet2DConditionModel", file.parent, torch.float32, CPU) is None
    file.rename(file.with_name("other.safetensors"))
    assert sharding.load_sharded("UNet2DConditionModel", file.parent, torch.float32, CPU) is None
