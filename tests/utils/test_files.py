"""Files are there complete or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest

from trainer.utils.files import remove_leftovers, write_atomically, write_json


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    file = tmp_path / "folder" / "status.json"
    write_atomically(file, "old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new and longer")
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file], "no temporary file stays"


def test_write_replaces_and_is_readable_by_others(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"text": "Grüße"})
    write_json(file, {"text": "neu"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"text": "neu"}
    assert file.stat().st_mode & 0o777 == 0o644


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    names = [".lora.safetensors.x1.tmp", "checkpoints/.000001.safetensors.y.tmp"]
    kept = ["notes.tmp", ".hidden", "checkpoints/000001.safetensors"]
    (tmp_path / "checkpoints").mkdir()
    for name in names + kept:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)
