"""Collections on disk: what is kept, what is refused, and that nothing is lost or counted twice."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from trainer.utils.errors import BadInput
from trainer.votes import records, store
from trainer.votes.records import Vote
from trainer.votes.store import Collection


def make_image(number: int, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, (number, 255 - number, 40))


def fill(collection: Collection, count: int = 4, prompt: str = "a fox") -> list[str]:
    return collection.add((make_image(i), prompt, "test") for i in range(count)).names


@pytest.fixture
def fox(tmp_path: Path) -> Collection:
    """A collection of four images; `names(fox)` are in the order in which they came."""
    collection = store.create(tmp_path, "fox")
    fill(collection)
    return collection


def names(collection: Collection) -> list[str]:
    return [item.image for item in collection.items()[0]]


# --------------------------------------------------------------------------------------------------------------- images


def test_images_are_kept_with_prompt_and_source_and_equal_ones_once(fox: Collection) -> None:
    transparent = make_image(1).convert("RGBA")
    added = fox.add(
        [(transparent, "another prompt", "test"), (make_image(9), "a cat", "cam"), (make_image(9), "x", "y")]
    )
    assert added.new == 1
    assert added.names[1] == added.names[2]
    items, complaints = fox.items()
    assert complaints == []
    assert [(item.prompt, item.source) for item in items] == [("a fox", "test")] * 4 + [("a cat", "cam")]
    assert Image.open(fox.image_file(items[4].image)).getpixel((0, 0)) == (9, 246, 40)
    assert len(list(fox.images.iterdir())) == 5


def test_images_of_equal_bytes_and_other_shapes_differ(fox: Collection) -> None:
    grey = Image.new("RGB", (4, 2), (5, 5, 5)), Image.new("RGB", (2, 4), (5, 5, 5))
    first, second = fox.add((image, "", "") for image in grey).names
    assert first != second


def test_large_images_are_reduced(fox: Collection) -> None:
    (name,) = fox.add([(make_image(7, (4100, 1025)), "", "")]).names
    assert Image.open(fox.images / name).size == (2048, 512)


def test_an_image_file_without_a_line_is_an_image_without_a_prompt(fox: Collection) -> None:
    make_image(77).save(fox.images / "by hand.png")
    assert names(fox)[4] == "by hand.png"
    assert fox.items()[0][4].prompt == ""


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b.png", "..\\b.png", "/etc/passwd", "a..png", "x.txt", "a\x00.png", "ä.png", 5, None, [1]],
)
def test_what_is_not_an_image_of_the_collection_is_refused(fox: Collection, name: object) -> None:
    with pytest.raises(BadInput, match="is not the name of an image file"):
        fox.image_file(name)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_links_are_not_images(fox: Collection, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    make_image(50).save(secret)
    (fox.images / "link.png").symlink_to(secret)
    with pytest.raises(BadInput, match=r"'link.png' is not in the collection"):
        fox.image_file("link.png")
    assert "link.png" not in names(fox)
    with pytest.raises(BadInput, match=r"'link.png' is not in the collection"):
        fox.record([Vote(names(fox)[0], "link.png", id="1")])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "images").symlink_to(fox.images, target_is_directory=True)
    (tmp_path / "whole").symlink_to(fox.folder, target_is_directory=True)
    assert store.names(tmp_path) == ["fox"]
    for name in ("other", "whole"):
        with pytest.raises(BadInput, match=f"no collection named '{name}'"):
            store.find(tmp_path, name)
        with pytest.raises(BadInput, match="cannot be created"):
            store.create(tmp_path, name)


# ---------------------------------------------------------------------------------------------------------------- votes


def test_a_vote_is_a_row_and_a_repeated_id_is_counted_once(fox: Collection) -> None:
    a, b, c, _ = names(fox)
    assert fox.record([Vote(a, b, id="1"), Vote(b, c, "tie", "2"), Vote(a, c, "skip", "3")]) == 3
    assert fox.record([Vote(a, b, id="1"), Vote(c, b, id="4"), Vote(c, b, id="4")]) == 1
    rows = fox.votes_file.read_text().splitlines()
    assert [row.rsplit(",", 1)[0] for row in rows] == [
        "better,worse,tie,skip,undo,id",
        f"{a},{b},,,,1",
        f"{b},{c},1,,,2",
        f"{a},{c},,1,,3",
        f"{c},{b},,,,4",
    ]
    vote_log = fox.vote_log()
    assert vote_log.votes == [Vote(a, b, id="1"), Vote(b, c, "tie", "2"), Vote(a, c, "skip", "3"), Vote(c, b, id="4")]
    assert vote_log.counts() == {"winners": 2, "ties": 1, "skips": 1}
    assert vote_log.complaints == []


def test_undo_appends_a_row_and_a_late_repeat_of_the_vote_does_not_bring_it_back(fox: Collection) -> None:
    a, b, c, _ = names(fox)
    votes = [Vote(a, b, id="1"), Vote(b, c, id="2"), Vote(a, c, id="3")]
    fox.record(votes)
    assert fox.undo("u1") == "3"
    assert fox.undo("u1") == "3"
    assert fox.undo("u2", "1") == "1"
    assert fox.record([votes[0]]) == 0
    assert fox.vote_log().votes == [votes[1]]
    assert fox.undo("u3") == "2"
    assert fox.undo("u4") is None
    assert fox.record([Vote(c, b, id="5")]) == 1
    assert fox.vote_log().votes == [Vote(c, b, id="5")]
    assert len(fox.votes_file.read_text().splitlines()) == 1 + 3 + 3 + 1


@pytest.mark.parametrize("id", ["", "a b", "a,b", "x" * 65, "é", "a\n", None, 7])
def test_ids_that_could_break_a_row_are_refused(fox: Collection, id: object) -> None:
    a, b, *_ = names(fox)
    with pytest.raises(BadInput, match="is invalid: use 1 to 64 letters"):
        fox.record([Vote(a, b, id=id)])
    with pytest.raises(BadInput, match="is invalid: use 1 to 64 letters"):
        fox.undo(id)
    assert not fox.votes_file.exists()


def test_an_id_names_one_vote(fox: Collection) -> None:
    a, b, c, _ = names(fox)
    fox.record([Vote(a, b, id="1"), Vote(b, c, id="2")])
    fox.undo("u", "1")
    for other in (Vote(b, a, id="1"), Vote(a, b, "tie", "1"), Vote(a, c, id="1"), Vote(a, b, id="u")):
        with pytest.raises(BadInput, match="belongs to another vote"):
            fox.record([Vote(a, c, id="9"), other])
    with pytest.raises(BadInput, match="'2' belongs to another vote"):
        fox.undo("2")
    with pytest.raises(BadInput, match="'u' belongs to another vote"):
        fox.undo("u", "2")
    with pytest.raises(BadInput, match="no vote with the id 'u'"):
        fox.undo("u2", "u")
    assert len(fox.votes_file.read_text().splitlines()) == 4
    with pytest.raises(BadInput, match="two different images"):
        fox.record([Vote(a, a, id="5")])
    with pytest.raises(BadInput, match="'nothing.png' is not in the collection"):
        fox.record([Vote(a, "nothing.png", id="5")])


# --------------------------------------------------------------------------------------------------------- broken files


def test_a_row_that_cannot_be_read_costs_that_row_with_a_sentence(fox: Collection) -> None:
    a, b, c, d = names(fox)
    fox.record([Vote(a, b, id="1")])
    broken = [
        f'{a},"{b},,,,2,',
        f"{a},{b},,,,3",
        f"{a},{b},yes,,,4,",
        f"{a},{b},1,1,,5,",
        f"{a},{a},,,,6,",
        f"{a},../../x.png,,,,7,",
        f"{a},{b},,,,a b,",
        ",,,,1,,",
        "\x00\ufffd",
    ]
    with fox.votes_file.open("a") as file:
        file.write("\n".join(broken) + "\n\n")
        file.write(f"{c},{d},,,,10,\r\n{c},{d},,,,10,\n")
    vote_log = fox.vote_log()
    assert vote_log.votes == [Vote(a, b, id="1"), Vote(c, d, id="10")]
    reasons = ["not CSV", "6 columns, but the header has 7", "tie and skip", "tie and skip", "the same",
               r"no image '../../x.png'", "'a b' is not a valid id",
               "an undo row must have an id", "1 columns"]  # fmt: skip
    assert len(vote_log.complaints) == len(reasons)
    for number, (complaint, reason) in enumerate(zip(vote_log.complaints, reasons, strict=True), 3):
        assert complaint.startswith(f"votes.csv, line {number} is ignored: ")
        assert reason in complaint
    assert fox.record([Vote(b, c, id="11")]) == 1
    assert fox.vote_log().votes[-1] == Vote(b, c, id="11")


def test_a_broken_header_costs_nothing_else(fox: Collection) -> None:
    a, b, *_ = names(fox)
    fox.record([Vote(a, b, id="1")])
    fox.votes_file.write_text(fox.votes_file.read_text().replace("better", "b\x00tter"))
    vote_log = fox.vote_log()
    assert vote_log.votes == [Vote(a, b, id="1")]
    assert "line 1 is ignored" in vote_log.complaints[0]


def test_a_broken_line_of_the_items_costs_the_prompt_of_that_image(fox: Collection) -> None:
    a, b, c, d = names(fox)
    lines = fox.items_file.read_text().splitlines()
    deep = "[" * 100_000
    bad = ["{", deep, "[]", '{"image": 3}', '{"image": "../x.png"}', json.dumps({"image": a, "prompt": ["x"]})]
    fox.items_file.write_text("\n".join([*lines[:2], *bad, lines[3]]) + "\n")
    items, complaints = fox.items()
    assert [(item.image, item.prompt) for item in items] == [(a, "a fox"), (b, "a fox"), (d, "a fox"), (c, "")]
    assert [complaint.split(":")[0] for complaint in complaints] == [
        f"items.jsonl, line {number} is ignored" for number in range(3, 9)
    ]


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_row_that_was_cut_short_is_repeated_and_counted_once(fox: Collection, cut: int) -> None:
    # As after a loss of power: the row is there in part, and its sender, who got no answer, sends it again.
    a, b, c, _ = names(fox)
    fox.record([Vote(a, b, id="1"), Vote(b, c, id="second")])
    content = fox.votes_file.read_bytes()
    fox.votes_file.write_bytes(content[:-cut])
    fox.record([Vote(b, c, id="second")])
    assert fox.vote_log().votes == [Vote(a, b, id="1"), Vote(b, c, id="second")]


def test_a_full_disk_leaves_the_file_as_it_was(fox: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c, _ = names(fox)
    fox.record([Vote(a, b, id="1")])
    before = fox.votes_file.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            fox.record([Vote(b, c, id="2")])
    assert fox.votes_file.read_bytes() == before
    assert fox.record([Vote(b, c, id="2")]) == 1


def test_a_hand_written_file_is_read_and_can_be_continued(tmp_path: Path) -> None:
    (tmp_path / "mine" / "images").mkdir(parents=True)
    for number in range(3):
        make_image(number).save(tmp_path / "mine" / "images" / f"fox {number}.png")
    mine = tmp_path / "mine" / "votes.csv"
    mine.write_text("\ufeffworse, better\nfox 0.png,fox 1.png\n\nfox 1.png,fox 9.png\nfox 2.png, fox 1.png", "utf-8")
    collection = store.find(tmp_path, "mine")
    written = [Vote("fox 1.png", "fox 0.png"), Vote("fox 1.png", "fox 2.png")]
    vote_log = collection.vote_log()
    assert vote_log.votes == written
    assert vote_log.complaints == ["votes.csv, line 4 is ignored: there is no image 'fox 9.png'"]
    assert collection.undo("u") is None
    collection.record([Vote("fox 0.png", "fox 2.png", id="1")])
    assert collection.vote_log().votes == [*written, Vote("fox 0.png", "fox 2.png", id="1")]
    assert mine.read_text().splitlines()[0] == "worse,better,tie,skip,undo,id,time"
    assert collection.undo("u") == "1"
    assert collection.vote_log().votes == written


# ------------------------------------------------------------------------------------------------------- names and bins

BAD_NAMES = ["", ".", "..", "../fox", "/etc", "a/b", "a\\b", "C:x", "nul", "COM1.txt", "a\x00b", "a\nb", "a\u202eb",
             "\ud800", "a.", " a", ".locks", ".bin", "x" * 65, 5, None]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: object) -> None:
    for act in (store.create, store.find, store.delete, store.restore):
        with pytest.raises(BadInput, match="collection "):
            act(tmp_path / "votes", name)
    assert not (tmp_path / "votes").exists()


def test_collections_are_listed_deleted_and_brought_back(tmp_path: Path) -> None:
    for name in ("fox", "Über mich 2"):
        fill(store.create(tmp_path, name))
    (tmp_path / "something else").mkdir()
    assert store.names(tmp_path) == ["fox", "Über mich 2"]
    assert len(names(store.create(tmp_path, "fox"))) == 4, "making it again opens it"
    with pytest.raises(BadInput, match="'something else' cannot be created"):
        store.create(tmp_path, "something else")
    with pytest.raises(BadInput, match="no collection named 'cat'; there are: fox, Über mich 2"):
        store.delete(tmp_path, "cat")
    old = store.find(tmp_path, "fox")
    store.delete(tmp_path, "fox")
    assert store.names(tmp_path) == ["Über mich 2"]
    with pytest.raises(BadInput, match="'fox' has been deleted"):
        old.record([Vote("a.png", "b.png", id="1")])
    store.create(tmp_path, "fox").add([(make_image(200), "", "")])
    with pytest.raises(BadInput, match="there is already a collection named 'fox'"):
        store.restore(tmp_path, "fox")
    store.delete(tmp_path, "fox")
    assert len(names(store.restore(tmp_path, "fox"))) == 1, "the one that was deleted last"
    with pytest.raises(BadInput, match="no deleted collection named 'cat'"):
        store.restore(tmp_path, "cat")


# ------------------------------------------------------------------------------------------------- several at one time


def _cast(folder: Path, voter: int, count: int) -> None:
    collection = Collection(folder)
    a, b, c, d = names(collection)
    for number in range(count):
        collection.record([Vote(a, b, id=f"{voter}-{number}")])
        collection.record([Vote(c, d, id=f"shared-{number}")])
    collection.undo(f"undo-{voter}", f"{voter}-0")


def test_processes_that_vote_at_once_lose_nothing_and_count_nothing_twice(fox: Collection) -> None:
    context, count = multiprocessing.get_context("fork"), 15
    processes = [context.Process(target=_cast, args=(fox.folder, voter, count)) for voter in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    vote_log = fox.vote_log()
    expected = {f"{voter}-{number}" for voter in range(3) for number in range(1, count)}
    expected |= {f"shared-{number}" for number in range(count)}
    assert sorted(vote.id for vote in vote_log.votes) == sorted(expected)
    assert vote_log.complaints == []


def _cast_until_killed(folder: Path, pipe: object) -> None:
    collection = Collection(folder)
    a, b, *_ = names(collection)
    for number in range(10_000):
        collection.record([Vote(a, b, id=str(number))])
        pipe.send(number)


def test_a_killed_process_has_on_disk_what_it_answered(fox: Collection) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_cast_until_killed, args=(fox.folder, send))
        process.start()
        send.close()
        for _ in range(10):
            receive.recv()
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        answered = -1
        while receive.poll():
            try:
                answered = receive.recv()
            except EOFError:
                break
        ids = [int(vote.id) for vote in fox.vote_log().votes]
        assert ids == list(range(len(ids)))
        assert len(ids) >= answered + 1
        assert fox.vote_log().complaints == []
        with fox.lock():  # the dead process does not hold it
            pass
