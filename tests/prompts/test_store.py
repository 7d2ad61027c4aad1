"""Files of conditions: what is written comes back, row by row, and nothing else is read."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trainer.models import Conditions, EntryConditions
from trainer.prompts import store
from trainer.prompts.store import open_conditions, write_conditions
from trainer.utils.errors import BadInput

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8, torch.float64]


def keys(count: int) -> list[tuple[str, str]]:
    return [(f"prompt {number} 🦊\u2028", "") for number in range(count)]


def batch(rows: int, tokens: int, seed: int, mask: bool = False) -> Conditions:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "embeds": torch.randn(rows, tokens, 5, generator=generator).bfloat16(),
        "pooled": torch.randn(rows, 3, generator=generator),
    }
    return Conditions(tensors | ({"mask": torch.ones(rows, tokens, dtype=torch.long)} if mask else {}))


def test_rows_come_back_in_any_order_from_several_batches_and_files(tmp_path: Path) -> None:
    batches = [batch(3, 4, 0), batch(3, 4, 1), batch(1, 4, 2)]
    whole = {name: torch.cat([p.tensors[name] for p in batches]) for name in ("embeds", "pooled")}
    write_conditions(tmp_path / "a.safetensors", keys(6), batches[:2])
    write_conditions(tmp_path / "b.safetensors", [("last", "00ff")], batches[2:])
    stored = open_conditions(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert stored.keys == [*keys(6), ("last", "00ff")]
    index = torch.tensor([5, 0, 6, 0, 2])
    read = stored.rows(index)
    for name, value in whole.items():
        assert read.tensors[name].dtype == value.dtype
        assert torch.equal(read.tensors[name], value[index]), name
    assert read.lengths is None
    some = stored.select([6, 1])
    assert (len(some), some.keys) == (2, [("last", "00ff"), keys(6)[1]])
    assert torch.equal(some.rows(torch.tensor([1])).tensors["pooled"], whole["pooled"][[1]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_and_odd_sizes_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    values = [torch.randint(0, 2, shape).to(dtype) for shape in ((1, 3), (1, 7, 1), (1, 1, 5, 3))]
    entry = {"cross_attn": values[0], "list": [values[1], {"inner": values[2]}], "scalar": torch.tensor(1).to(dtype)}
    write_conditions(tmp_path / "c.safetensors", [("a", "")], [EntryConditions.of([entry])])
    (back,) = open_conditions(tmp_path / "c.safetensors").rows(torch.tensor([0])).entries
    assert torch.equal(back["cross_attn"], values[0])
    assert torch.equal(back["list"][0], values[1])
    assert torch.equal(back["list"][1]["inner"], values[2])
    assert back["scalar"].shape == ()
    assert {back["cross_attn"].dtype, back["scalar"].dtype} == {dtype}


def test_entries_of_a_graph_come_back_and_shared_tensors_are_there_once(tmp_path: Path) -> None:
    shared = torch.randn(1, 16, 4, 4)
    entries = [
        {
            "cross_attn": torch.randn(1, n, 8),
            "guidance": 3.5,
            "reference_latents": [shared],
            "mask": None,
            "n": {"a": 1},
        }
        for n in (5, 7)
    ]
    batches = (EntryConditions.of([entry | {"reference_latents": [shared.clone()]}]) for entry in entries)
    write_conditions(tmp_path / "c.safetensors", [("a", ""), ("b", "")], batches)
    stored = open_conditions(tmp_path / "c.safetensors")
    assert stored.files[0].size == 4 * (5 * 8 + 7 * 8 + shared.numel())
    back = stored.rows(torch.tensor([1, 0, 1]))
    assert isinstance(back, EntryConditions)
    groups = {entry["cross_attn"].shape[1]: (rows.tolist(), entry) for rows, entry in back.groups()}
    assert {length: rows for length, (rows, _) in groups.items()} == {5: [1], 7: [0, 2]}
    for entry in entries:
        found = groups[entry["cross_attn"].shape[1]][1]
        assert torch.equal(found["cross_attn"], entry["cross_attn"])
        assert torch.equal(found["reference_latents"][0], shared)
        assert (found["guidance"], found["mask"], found["n"]) == (3.5, None, {"a": 1})
    first, second = (entry["reference_latents"][0] for entry in back.entries)
    assert first is second, "once in memory too"


def test_masked_rows_are_filled_up_to_the_longest_of_all(tmp_path: Path) -> None:
    batches = [batch(2, 3, 0, mask=True), batch(1, 6, 1, mask=True)]
    write_conditions(tmp_path / "c.safetensors", keys(3), batches)
    stored = open_conditions(tmp_path / "c.safetensors")
    read = stored.rows(torch.tensor([1]))
    assert read.tensors["embeds"].shape == (1, 6, 5)
    assert torch.equal(read.tensors["embeds"][:, :3], batches[0].tensors["embeds"][1:])
    assert not read.tensors["embeds"][:, 3:].any()
    assert read.tensors["mask"].tolist() == [[1, 1, 1, 0, 0, 0]]
    assert read.lengths is None
    assert not stored.is_ragged


def test_rows_without_a_mask_keep_their_lengths(tmp_path: Path) -> None:
    batches = [batch(2, 3, 0), batch(1, 6, 1)]
    write_conditions(tmp_path / "c.safetensors", keys(3), batches)
    stored = open_conditions(tmp_path / "c.safetensors")
    assert stored.is_ragged
    alike = stored.rows(torch.tensor([1, 0]))
    assert (alike.tensors["embeds"].shape, alike.lengths) == ((2, 3, 5), None)
    read = stored.rows(torch.tensor([0, 2, 1, 2]))
    assert read.lengths.tolist() == [3, 6, 3, 6]
    parts = read.by_length()
    assert [(rows.tolist(), part.tensors["embeds"].shape) for rows, part in parts] == [
        ([0, 2], (2, 3, 5)),
        ([1, 3], (2, 6, 5)),
    ]
    assert torch.equal(parts[0][1].tensors["embeds"], batches[0].tensors["embeds"])
    assert torch.equal(parts[0][1].tensors["pooled"], batches[0].tensors["pooled"])
    # A batch that has lengths is written without its filling.
    write_conditions(tmp_path / "d.safetensors", keys(4), [read])
    again = open_conditions(tmp_path / "d.safetensors").rows(torch.arange(4))
    assert torch.equal(again.tensors["embeds"], read.tensors["embeds"])
    assert again.lengths.tolist() == [3, 6, 3, 6]


def test_one_batch_is_in_memory_at_a_time_and_one_row_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[object] = []
    import weakref

    def batches() -> Iterator[Conditions]:
        for number in range(20):
            assert sum(reference() is not None for reference in alive) <= 1, "the batch before is gone"
            made = batch(4, 50, number)
            alive.append(weakref.ref(made.tensors["embeds"]))
            yield made
            del made

    announced: list[int] = []
    write_conditions(tmp_path / "c.safetensors", keys(80), batches(), announce=announced.append)
    row = 50 * 5 * 2 + 4 + 3 * 4  # with 4 bytes of alignment in each batch
    assert announced == [pytest.approx(80 * row, rel=0.02)], "said once, after the first batch"
    stored = open_conditions(tmp_path / "c.safetensors")
    read: list[slice] = []

    class Watched:
        def __getitem__(self, part: slice) -> torch.Tensor:
            read.append(part)
            return data[part]

    data, stored.files[0].data = stored.files[0].data, Watched()
    stored.rows(torch.tensor([37, 37, 37]))
    assert sum(part.stop - part.start for part in read) == 50 * 5 * 2 + 3 * 4, "37 once, and nothing else"


def test_it_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    write_conditions(tmp_path / "c.safetensors", keys(2), [batch(2, 4, 0)])
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"data", "index"}
        assert json.loads(file.get_tensor("index").numpy().tobytes())["keys"] == [list(key) for key in keys(2)]


def test_nothing_is_left_where_writing_fails(tmp_path: Path) -> None:
    def fails() -> Iterator[Conditions]:
        yield batch(2, 4, 0)
        raise RuntimeError("the encoder failed")

    def refuse(size: int) -> None:
        raise BadInput("no room")

    for batches, announce, words in (
        (fails(), lambda size: None, "the encoder failed"),
        ([batch(2, 4, 0)], refuse, "no room"),
        ([batch(2, 4, 0)], lambda size: None, "2 rows of conditions for 4 prompts"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=words):
            write_conditions(tmp_path / "c.safetensors", keys(4), batches, announce=announce)
        assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    write_conditions(tmp_path / "c.safetensors", keys(3), [batch(3, 4, 0)])
    whole, other = (tmp_path / "c.safetensors").read_bytes(), tmp_path / "d.safetensors"
    with pytest.raises(BadInput, match="none.safetensors cannot be read"):
        open_conditions(tmp_path / "none.safetensors")
    save_file({"embeds": torch.zeros(2, 3)}, other)
    with pytest.raises(BadInput, match="d.safetensors cannot be read"):
        open_conditions(other)
    generator = torch.Generator().manual_seed(0)
    read = 0
    for number in range(300):
        spoiled = bytearray(whole)
        if number % 3 == 0:
            del spoiled[int(torch.randint(len(whole), (1,), generator=generator)) :]
        else:
            for place in torch.randint(len(whole), (3,), generator=generator).tolist():
                spoiled[place] = int(torch.randint(256, (1,), generator=generator))
        other.write_bytes(bytes(spoiled))
        try:
            open_conditions(other).rows(torch.arange(3))
            read += 1
        except BadInput as error:
            assert "d.safetensors" in str(error)
            assert "\n" not in str(error)
    assert 0 < read < 300


def test_places_outside_the_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = store._Writer._write
    for start, shape in ((10**6, [1, 4, 5]), (-8, [1, 4, 5]), (0, [1, 10**12, 5]), (0, [1, -4, 5])):
        monkeypatch.setattr(
            store._Writer,
            "_write",
            lambda self, value, start=start, shape=shape: write(self, value) | {"start": start, "shape": shape},
        )
        write_conditions(tmp_path / "c.safetensors", keys(1), [Conditions({"embeds": torch.zeros(1, 4, 5)})])
        monkeypatch.undo()
        with pytest.raises(BadInput, match="c.safetensors is damaged"):
            open_conditions(tmp_path / "c.safetensors").rows(torch.tensor([0]))
