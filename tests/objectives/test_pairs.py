"""Pairs for offline objectives: which votes become one, and what is said of the others."""

from pathlib import Path

import pytest
from PIL import Image

from trainer.objectives.pairs import read_pairs
from trainer.utils.errors import BadInput
from trainer.votes import store
from trainer.votes.records import Vote
from trainer.votes.store import Collection


def make_image(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, 90, 20))


@pytest.fixture
def fox(tmp_path: Path) -> Collection:
    made = store.create(tmp_path, "fox")
    made.add((make_image(40 * i), "a fox", "") for i in range(5))
    return made


def names(collection: Collection) -> list[str]:
    return [item.image for item in collection.items()[0]]


def test_votes_with_a_winner_between_images_of_one_prompt_are_pairs_and_the_others_are_counted(fox: Collection) -> None:
    a, b, c, d, e = names(fox)
    cat, nothing, other = fox.add(
        [(make_image(250), "a cat", ""), (make_image(251), "", ""), (make_image(252), " ", "")]
    ).names
    votes = [(a, b, "winner"), (a, c, "tie"), (a, d, "skip"), (cat, a, "winner"), (d, c, "winner"), (c, b, "winner")]
    votes += [(nothing, other, "winner"), (e, a, "winner"), (e, b, "winner")]
    fox.record([Vote(one, two, kind, str(i)) for i, (one, two, kind) in enumerate(votes)])
    fox.undo("u", "5")
    (fox.images / e).unlink()
    with fox.votes_file.open("a") as file:
        file.write("broken\n")
    found = read_pairs(fox.folder)
    assert [(p.better.name, p.worse.name, p.prompt) for p in found.pairs] == [(a, b, "a fox"), (d, c, "a fox")]
    assert found.sentence() == (
        "2 pairs of fox; not used: 3 votes on a line that cannot be read or names an image that is missing, 1 ties, "
        "1 skipped pairs, 2 between images of different prompts"
    )
    (fox.images / d).write_text("no image")
    with pytest.raises(BadInput, match=r"1 pairs of fox; .*1 with an image that is missing.*at least 2 are needed"):
        read_pairs(fox.folder)


def test_the_digest_follows_the_votes_and_not_the_folder(fox: Collection, tmp_path: Path) -> None:
    a, b, c, *_ = names(fox)
    fox.record([Vote(a, b, id="1"), Vote(b, c, id="2")])
    before = read_pairs(fox.folder).digest()
    moved = fox.folder.rename(tmp_path / "elsewhere")
    assert read_pairs(moved).digest() == before
    Collection(moved).record([Vote(a, c, id="3")])
    assert read_pairs(moved).digest() != before


def test_a_table_of_image_files_and_prompts_is_a_set_of_pairs(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.png"):
        make_image(len(name)).save(tmp_path / name)
    table = tmp_path / "pairs.csv"
    rows = ["better,worse,prompt", "a.png,b.png,a fox", "sub/c.png,a.png,a cat", "no.png,a.png,a cat", "a.png,b.png,"]
    table.write_text("\n".join(rows))
    found = read_pairs(table)
    assert [p.prompt for p in found.pairs] == ["a fox", "a cat"] == found.prompts
    assert len(found.files) == 3
    assert found.sentence() == (
        "2 pairs of pairs.csv; not used: 1 with an image that is missing or cannot be read, 1 without a prompt"
    )
    for content, says in [
        ("better,worse\na,b\n", "must have the columns"),
        ('better,worse,prompt\na,"b,c\n', "is not CSV"),
        ("better,worse,prompt\n,b.png,x\na\0,a.png,x\n", "2 with an image that is missing"),
    ]:
        table.write_text(content)
        with pytest.raises(BadInput, match=says):
            read_pairs(table)
    with pytest.raises(BadInput, match=r"neither a collection of votes nor a \.csv file"):
        read_pairs(tmp_path / "a.png")
    with pytest.raises(BadInput, match="not a collection of votes"):
        read_pairs(tmp_path / "nowhere")


def test_a_link_out_of_the_folder_is_no_image_of_a_pair(fox: Collection, tmp_path: Path) -> None:
    a, b, c, *_ = names(fox)
    fox.record([Vote(a, b, id="1"), Vote(b, c, id="2"), Vote(a, c, id="3")])
    secret = tmp_path / "secret.png"
    (fox.images / a).rename(secret)
    (fox.images / a).symlink_to(secret)
    with pytest.raises(BadInput, match="at least 2 are needed"):
        read_pairs(fox.folder)
