"""The conditions of a run: what is encoded, where it is kept, and what the model is given."""

import gc
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_families import CASES, write_image

from trainer.config import ModelConfig, RunConfig, parse_config
from trainer.models import Conditions, model_class
from trainer.models.diffusers.sd3 import SD3Model
from trainer.prompts.conditions import conditions_for, encode_into, needs_negative, prompts_to_encode
from trainer.prompts.sets import read_prompts
from trainer.prompts.store import open_conditions, write_conditions
from trainer.utils.distributed import Processes
from trainer.utils.errors import BadInput

CPU = torch.device("cpu")


def description(model: dict, **sections: dict) -> RunConfig:
    data = {"model": {"height": 16, "width": 16} | model, "rewards": [{"name": "brightness"}]}
    return parse_config(data | {"prompts": {"texts": ["a red circle", "two triangles"]}} | sections)


@pytest.fixture
def sd3(tiny_sd3: Path) -> RunConfig:
    return description({"path": str(tiny_sd3)}, evaluation={"texts": ["a square"]})


@pytest.mark.parametrize(
    ("rollout", "evaluation", "needed"),
    [
        ({}, {}, False),
        ({"guidance_scale": 2}, {}, True),
        ({}, {"texts": ["x"], "guidance_scale": 3}, True),
        ({}, {"guidance_scale": 3}, False),
        ({"guidance_scale": 2}, {"texts": ["x"], "guidance_scale": 1}, True),
    ],
)
def test_the_negative_prompt_is_encoded_where_guidance_uses_it(rollout: dict, evaluation: dict, needed: bool) -> None:
    config = description({}, rollout=rollout, evaluation=evaluation)
    training, held_out = read_prompts(config)
    assert needs_negative(config, held_out) is needed
    wanted = prompts_to_encode(config, training, held_out, needed)
    assert (("", "") in wanted) is needed
    assert len(wanted) == 2 + len(held_out.texts) + needed


class Thread(Processes):
    """One of several processes, as a thread."""

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[list]) -> None:
        super().__init__("cpu")
        self.rank, self.count, self.barrier, self.board = rank, barrier.parties, barrier, board

    def gather(self, items: list) -> list:
        self.board[self.rank] = list(items)
        self.barrier.wait(60)
        found = [item for part in self.board for item in part]
        self.barrier.wait(60)  # until every thread has read them
        return found

    def broadcast(self, value: object) -> object:
        return self.gather([value])[0]


def in_processes(count: int, call: Callable[[Processes], object]) -> list:
    """What `call` gives in each of several processes, or raises there."""
    barrier, board = threading.Barrier(count), [[] for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(call, Thread(rank, barrier, board)) for rank in range(count)]
        return [future.exception() or future.result() for future in futures]


def test_conditions_of_a_run_are_in_a_file_and_equal_those_in_memory(sd3: RunConfig, tmp_path: Path) -> None:
    config = parse_config(sd3.model_dump(mode="json"), ["rollout.guidance_scale=2", "prompts.negative=blue"])
    training, held_out = read_prompts(config)
    texts = [*training.texts, *held_out.texts, "blue"]
    own = SD3Model.encode(config.model, texts, CPU)
    found = conditions_for(config, SD3Model, training, held_out, Processes("cpu"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["encoded-0.safetensors"]
    parts = (found.training, [0, 1]), (found.held_out, [2])
    for name, value in own.tensors.items():
        for stored, rows in parts:
            assert torch.equal(stored.rows(torch.arange(len(rows))).tensors[name], value[rows])
        assert torch.equal(found.unconditional.tensors[name], value[[3]])
    del found, stored, parts
    gc.collect()
    assert list(tmp_path.iterdir()) == [], "deleted with the run"


def test_nothing_of_a_temporary_folder_is_left_while_it_is_read(
    sd3: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a process that is killed leaves nothing there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prompts = read_prompts(sd3)
    found = conditions_for(sd3, SD3Model, *prompts, Processes("cpu"), None)
    assert list(tmp_path.iterdir()) == []
    own = SD3Model.encode(sd3.model, list(prompts[0].texts), CPU)
    read = found.training.rows(torch.arange(len(own)))
    assert torch.equal(read.tensors["embeds"], own.tensors["embeds"])

    def encode_batches(*_: object) -> Iterator:
        assert [path.name[:10] for path in tmp_path.iterdir()] == ["dancegrpo-"]
        raise BadInput("no text encoder")

    monkeypatch.setattr(SD3Model, "encode_batches", encode_batches)
    with pytest.raises(BadInput, match="no text encoder"):
        conditions_for(sd3, SD3Model, *prompts, Processes("cpu"), None)
    assert list(tmp_path.iterdir()) == []


def test_processes_share_a_temporary_folder(sd3: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    texts = [f"prompt {n}" for n in range(40)]
    config = parse_config(sd3.model_dump(mode="json") | {"prompts": {"texts": texts}, "evaluation": {}})
    monkeypatch.setattr(
        SD3Model,
        "encode_batches",
        lambda model, texts, *_: (numbered(texts[start : start + 16]) for start in range(0, len(texts), 16)),
    )
    prompts = read_prompts(config)
    results = in_processes(2, lambda processes: conditions_for(config, SD3Model, *prompts, processes, None))
    for found in results:
        assert found.training.rows(torch.arange(40)).tensors["embeds"].flatten().tolist() == list(map(float, range(40)))
    assert list(tmp_path.iterdir()) == []


def numbered(texts: list[str]) -> Conditions:
    """Conditions that say which prompt they are of."""
    return Conditions({"embeds": torch.tensor([[[float(text.split()[1])]] for text in texts])})


def test_processes_encode_a_share_each_and_read_all(
    tmp_path: Path, sd3: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(sd3.model_dump(mode="json") | {"prompts": {"texts": [f"prompt {n}" for n in range(40)]}})
    training, held_out = read_prompts(config)
    encoded: list[int] = []

    def encode_batches(model: ModelConfig, texts: list, images: list, negative: str, device: object) -> Iterator:
        encoded.append(len(texts))
        yield from (numbered(texts[start : start + 16]) for start in range(0, len(texts), 16))

    monkeypatch.setattr(SD3Model, "encode_batches", encode_batches)
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"texts": ["held 40"]})})
    training, held_out = read_prompts(config)
    (tmp_path / "encoded-7.safetensors").write_bytes(b"of a run of eight processes that was killed")
    for count, shares in ((3, [9, 16, 16]), (4, [9, 16, 16]), (2, [16, 25])):
        encoded.clear()
        found = in_processes(
            count, lambda processes: conditions_for(config, SD3Model, training, held_out, processes, tmp_path)
        )
        assert sorted(encoded) == shares, "in whole batches, and nothing twice"
        for each in found:
            order = torch.tensor([39, 0, 17, 16])
            assert each.training.rows(order).tensors["embeds"].flatten().tolist() == order.tolist()
            assert each.held_out.rows(torch.tensor([0])).tensors["embeds"].item() == 40
        assert len(list(tmp_path.glob("*"))) == min(count, 3)
        del found, each
        gc.collect()


def test_a_fault_in_one_process_is_raised_in_all(
    tmp_path: Path, sd3: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(sd3.model_dump(mode="json") | {"prompts": {"texts": [f"prompt {n}" for n in range(40)]}})
    prompts = read_prompts(config)

    def encode_batches(model: ModelConfig, texts: list, *_: object) -> Iterator:
        if "prompt 20" in texts:
            raise BadInput("the second process cannot encode")
        yield numbered(texts)

    monkeypatch.setattr(SD3Model, "encode_batches", encode_batches)
    found = in_processes(2, lambda processes: conditions_for(config, SD3Model, *prompts, processes, tmp_path))
    assert [type(error) for error in found] == [BadInput, BadInput]
    assert {str(error) for error in found} == {"the second process cannot encode"}


def test_size_is_said_before_the_start_and_a_full_disk_is_refused(
    sd3: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    wanted = {(f"prompt {n}", ""): None for n in range(50_000)}
    made: list[int] = []

    def encode_batches(*_: object) -> Iterator[Conditions]:
        for _ in range(3):
            made.append(16)
            yield Conditions({"embeds": torch.zeros(16, 512, 4096).bfloat16()[:, :1].expand(16, 512, 4096)})

    monkeypatch.setattr(SD3Model, "encode_batches", encode_batches)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=200 * 2**30))
    with pytest.raises(ValueError, match="48 rows of conditions for 50000 prompts"):
        encode_into(tmp_path / "c.safetensors", sd3, SD3Model, wanted, CPU)
    assert "encoding 50000 prompts, which take about 195.3 GiB of disk space in" in capsys.readouterr().err
    made.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100 * 2**30))
    with pytest.raises(
        BadInput, match="50000 encoded prompts need about 195.3 GiB of disk space, but .* has 100.0 GiB free"
    ):
        encode_into(tmp_path / "c.safetensors", sd3, SD3Model, wanted, CPU)
    assert made == [16], "said after the first prompts, not after all"
    assert list(tmp_path.iterdir()) == []


def test_small_sets_are_encoded_without_a_word(sd3: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    encode_into(tmp_path / "c.safetensors", sd3, SD3Model, {("a circle", ""): None}, CPU)
    assert "encoding" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ text and image


def test_each_image_of_an_instruction_has_its_own_conditions(tmp_path: Path) -> None:
    case = CASES["qwen-image-edit"]
    folder = case.build(tmp_path / "model")
    for name, seed in (("a", 1), ("b", 2)):
        write_image(tmp_path / f"{name}.png", seed)
    lines = [{"prompt": "make it blue", "image": f"{name}.png"} for name in "ab"]
    lines += [{"prompt": "make the whole image much brighter", "image": "a.png"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model = {"family": case.family, "path": str(folder), **case.model}
    config = description(
        model, prompts={"file": str(tmp_path / "p.jsonl"), "negative": "grey"}, rollout={"guidance_scale": 4.0}
    )
    family, prompts = model_class(config.model), read_prompts(config)
    here = conditions_for(config, family, *prompts, Processes("cpu"), None)
    encode_into(tmp_path / "c.safetensors", config, family, prompts_to_encode(config, *prompts, True), CPU)
    file = parse_config(config.model_dump(mode="json"), [f"prompts.conditions={tmp_path / 'c.safetensors'}"])
    written = conditions_for(file, family, *prompts, Processes("cpu"), None)
    images = [tmp_path / f"{name}.png" for name in "aba"]
    texts = [line["prompt"] for line in lines]
    whole = family.encode(config.model, [*texts, "grey"], CPU, [*images, None])
    for found in (here, written):
        read = found.training.rows(torch.arange(3))
        for name, value in whole.tensors.items():
            assert torch.equal(read.tensors[name], value[:3]), name
    assert not torch.equal(read.tensors["embeds"][0], read.tensors["embeds"][1])
    assert not torch.equal(read.tensors["image_latents"][0], read.tensors["image_latents"][1])
    # Another image under the same name: the file holds nothing for it.
    write_image(tmp_path / "b.png", 3)
    with pytest.raises(BadInput, match="does not contain 'make it blue' with image .*b.png: encode again"):
        conditions_for(file, family, *read_prompts(file), Processes("cpu"), None)


def test_a_file_that_lacks_the_negative_prompt_says_so(sd3: RunConfig, tmp_path: Path) -> None:
    prompts = read_prompts(sd3)
    encode_into(tmp_path / "c.safetensors", sd3, SD3Model, prompts_to_encode(sd3, *prompts, False), CPU)
    settings = [f"prompts.conditions={tmp_path / 'c.safetensors'}", "prompts.negative=blurry"]
    config = parse_config(sd3.model_dump(mode="json"), settings)
    assert conditions_for(config, SD3Model, *prompts, Processes("cpu"), None).unconditional is None
    guided = parse_config(sd3.model_dump(mode="json"), [*settings, "rollout.guidance_scale=2"])
    with pytest.raises(BadInput, match="does not contain the negative prompt 'blurry'"):
        conditions_for(guided, SD3Model, *prompts, Processes("cpu"), None)


# ----------------------------------------------------------------------------------------------- prompts of any length


@torch.no_grad()
def test_long_prompts_beside_short_ones_are_predicted_as_if_alone(sd3: RunConfig, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [
        Conditions(
            {
                "embeds": torch.randn(1, tokens, 128, generator=generator),
                "pooled": torch.randn(1, 128, generator=generator),
            }
        )
        for tokens in (77, 154, 77)
    ]
    write_conditions(tmp_path / "c.safetensors", [("a", ""), ("b", ""), ("", "")], rows)
    stored, model = open_conditions(tmp_path / "c.safetensors"), SD3Model.load(sd3.model, CPU)
    order = [1, 0, 2, 1, 0]
    latents = torch.randn(5, *model.latent_shape, generator=generator)
    sigma = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1])
    read = stored.rows(torch.tensor(order))
    assert read.lengths.tolist() == [154, 77, 77, 154, 77]
    together = model.predict_guided(latents, sigma, read)
    guided = model.predict_guided(latents, sigma, read, 3.0, stored.rows(torch.tensor([1])))
    for i, row in enumerate(order):
        one = latents[i : i + 1], sigma[i : i + 1]
        alone = model.predict(*one, rows[row])
        assert (together[i] - alone[0]).abs().max() < 1e-5
        negative = model.predict(*one, rows[1])
        assert (guided[i] - (negative + 3 * (alone - negative))[0]).abs().max() < 1e-4
    assert (together[1] - model.predict(latents[1:2], sigma[1:2], rows[1])[0]).abs().max() > 1e-3


def test_a_divided_network_takes_prompts_of_one_length(sd3: RunConfig, tmp_path: Path) -> None:
    rows = [Conditions({"embeds": torch.randn(1, n, 128), "pooled": torch.randn(1, 128)}) for n in (77, 154)]
    write_conditions(tmp_path / "c.safetensors", [("a", ""), ("b", "")], rows)
    prompts = {"texts": ["a", "b"], "conditions": str(tmp_path / "c.safetensors")}
    config = description({"path": sd3.model.path, "sharded": True}, prompts=prompts)
    with pytest.raises(BadInput, match="model.sharded needs prompts that are all encoded to the same number of tokens"):
        conditions_for(config, SD3Model, *read_prompts(config), Processes("cpu"), None)
