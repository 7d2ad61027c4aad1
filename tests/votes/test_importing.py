"""Images and votes from folders, and export."""

import csv
import os
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from trainer.utils.errors import BadInput
from trainer.votes import store
from trainer.votes.importing import balanced_pairs, export, import_favourites, import_folder
from trainer.votes.records import Vote
from trainer.votes.store import Collection


@pytest.fixture
def fox(tmp_path: Path) -> Collection:
    return store.create(tmp_path / "votes", "fox")


def write(folder: Path, names: list[str], start: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names, start):
        Image.new("RGB", (8, 8), (number, 255 * (number % 2), 20 * number % 256)).save(folder / name)
    return folder


def huge_png(width: int, height: int) -> bytes:
    """A small file that says it holds a large image."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_folder_is_imported_with_its_captions_and_again_adds_nothing(fox: Collection, tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", ["b.png", "a.JPG", "c.webp"])
    (folder / "b.txt").write_text(" a cat \n")
    write(folder / "below", ["d.png"], start=100)
    found = import_folder(fox, folder, prompt="a fox")
    assert (found.new, found.known, found.complaints) == (3, 0, [])
    items = fox.items()[0]
    assert [(item.prompt, item.source) for item in items] == [
        ("a fox", "photos: a.JPG"), ("a cat", "photos: b.png"), ("a fox", "photos: c.webp")
    ]  # fmt: skip
    again = import_folder(fox, folder)
    assert (again.new, again.known) == (0, 3)
    assert fox.items()[0] == items


def test_files_that_cannot_be_read_are_left_out_with_a_sentence(fox: Collection, tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", ["good.png"])
    (folder / "text.png").write_text("<script>alert(1)</script>")
    (folder / "huge.png").write_bytes(huge_png(10_000, 10_000))
    Image.effect_noise((64, 64), 50).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])
    found = import_folder(fox, folder)
    assert found.new == 1
    assert [complaint.split(" was skipped")[0] for complaint in found.complaints] == ["cut.png", "huge.png", "text.png"]
    assert "10000 x 10000 pixels" in found.complaints[1]


def test_nothing_to_import_is_one_sentence(fox: Collection, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no folder 'photos'"):
        import_folder(fox, tmp_path / "photos")
    (tmp_path / "photos").mkdir()
    with pytest.raises(BadInput, match=r"'photos' has no images: \.png"):
        import_folder(fox, tmp_path / "photos")
    (tmp_path / "photos" / "a.png").write_text("x")
    with pytest.raises(BadInput, match=r"no image of 'photos' can be read: a\.png was skipped"):
        import_folder(fox, tmp_path / "photos")


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_links_are_not_followed(fox: Collection, tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", ["a.png"])
    write(tmp_path / "secret", ["b.png"], start=50)
    (tmp_path / "secret" / "b.txt").write_text("secret")
    (folder / "link.png").symlink_to(tmp_path / "secret" / "b.png")
    (folder / "a.txt").symlink_to(tmp_path / "secret" / "b.txt")
    assert import_folder(fox, folder).new == 1
    assert fox.items()[0][0].prompt == ""


def test_favourites_become_balanced_votes_once(fox: Collection, tmp_path: Path) -> None:
    liked = write(tmp_path / "liked", [f"{i}.png" for i in range(6)])
    others = write(tmp_path / "others", [f"{i}.png" for i in range(9)], start=100)
    found = import_favourites(fox, liked, others, "a fox")
    assert (found.new, found.votes) == (15, 24)
    sources = {item.image: item.source.split()[0] for item in fox.items()[0]}
    votes = fox.vote_log().votes
    assert {(sources[vote.better], sources[vote.worse]) for vote in votes} == {("favourites", "others")}
    again = import_favourites(fox, liked, others)
    assert (again.new, again.known, again.votes) == (0, 15, 0)
    assert fox.vote_log().votes == votes
    with pytest.raises(BadInput, match="6 images are in both liked and liked"):
        import_favourites(fox, liked, liked)
    with pytest.raises(BadInput, match="no folder 'nowhere'"):
        import_favourites(fox, liked, tmp_path / "nowhere")


@pytest.mark.parametrize("better", [1, 3, 4, 10, 37])
@pytest.mark.parametrize("worse", [1, 2, 4, 10, 30])
def test_pairs_of_favourites_are_different_and_even(better: int, worse: int) -> None:
    found = balanced_pairs([f"b{i}" for i in range(better)], [f"w{i}" for i in range(worse)])
    assert len(set(found)) == len(found) == better * min(4, worse)
    assert set(Counter(one for one, _ in found).values()) == {min(4, worse)}
    uses = [Counter(other for _, other in found)[f"w{i}"] for i in range(worse)]
    assert max(uses) - min(uses) <= 4 if better < worse else max(uses) - min(uses) <= min(4, worse)
    assert sum(uses) == len(found)
    if len(found) >= 4 * worse:
        assert min(uses) >= 1


def test_export_holds_what_counts(fox: Collection, tmp_path: Path) -> None:
    import_folder(fox, write(tmp_path / "photos", ["a.png", "b.png", "c.png"]), "a, fox")
    a, b, c = (item.image for item in fox.items()[0])
    fox.record([Vote(a, b, id="1"), Vote(b, c, "tie", "2"), Vote(c, a, id="3")])
    fox.undo("u")
    export(fox, tmp_path / "exports" / "fox.zip")
    with zipfile.ZipFile(tmp_path / "exports" / "fox.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    with (tmp_path / "unpacked" / "votes.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["better", "worse", "tie", "skip", "prompt"],
            [a, b, "0", "0", "a, fox"],
            [b, c, "1", "0", "a, fox"],
        ]
    copy = Collection(tmp_path / "unpacked")
    assert [(v.better, v.worse, v.kind) for v in copy.vote_log().votes] == [(a, b, "winner"), (b, c, "tie")]
    assert copy.items() == fox.items()
    assert copy.image_file(a).read_bytes() == fox.image_file(a).read_bytes()
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["fox.zip"]
