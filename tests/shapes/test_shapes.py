"""The shapes world: its language, its images and its checker."""

import random

import numpy as np
import pytest
import torch

from tools.pretrain_shapes import caption, corrupt, describe, meaning
from trainer.shapes.checker import check, find_shapes
from trainer.shapes.prompts import TASKS, TEMPLATES, Phrase, Prompt, balanced_prompts, parse, prompts
from trainer.shapes.world import BACKGROUNDS, PALETTE, Scene, SceneObject, make_scene, render

PER_TASK = 150


def some(task: str, count: int = PER_TASK, held_out: bool = True) -> list[Prompt]:
    return random.Random(task).choices(prompts(task, held_out), k=count)


# ----------------------------------------------------------------------------------------------------------- language


def test_there_are_the_six_tasks_of_geneval() -> None:
    assert set(TASKS) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("held_out", [False, True])
def test_every_prompt_is_read_back_as_what_it_says(task: str, held_out: bool) -> None:
    pool = prompts(task, held_out)
    assert pool
    for prompt in pool:
        read = parse(prompt.text)
        assert (read.text, read.phrases, read.relation) == (prompt.text, prompt.phrases, prompt.relation)
        assert read.task == task


def test_training_and_held_out_prompts_share_nothing() -> None:
    training, held_out = ({p.text for t in TASKS for p in prompts(t, flag)} for flag in (False, True))
    assert not training & held_out
    assert len(held_out) > 100
    seen, unseen = ({p.phrases for p in prompts("color_attr", flag)} for flag in (False, True))
    assert not seen & unseen  # here whole contents are held out, not just sentences


def test_numbers_of_contents() -> None:
    contents = {t: {(p.phrases, p.relation) for f in (False, True) for p in prompts(t, f)} for t in TASKS}
    counts = {task: len(found) for task, found in contents.items()}
    assert counts == {
        "single_object": 3,
        "two_object": 6,
        "counting": 9,
        "colors": 18,
        "position": 24,
        "color_attr": 180,
    }
    texts = [p.text for t in TASKS for f in (False, True) for p in prompts(t, f)]
    assert len(texts) == len(set(texts)) == len(TEMPLATES) * sum(counts.values())


@pytest.mark.parametrize(
    ("text", "phrases", "relation", "task"),
    [
        ("a circle", (Phrase("circle"),), None, "single_object"),
        ("An orange square.", (Phrase("square", "orange"),), None, "colors"),
        ("a drawing of  three triangles", (Phrase("triangle", count=3),), None, "counting"),
        ("a circle and a square", (Phrase("circle"), Phrase("square")), None, "two_object"),
        (
            "a red circle and a blue square",
            (Phrase("circle", "red"), Phrase("square", "blue")),
            None,
            "color_attr",
        ),
        (
            "a poster of a circle to the left of a triangle",
            (Phrase("circle"), Phrase("triangle")),
            "to the left of",
            "position",
        ),
    ],
)
def test_parse_by_hand(text: str, phrases: tuple[Phrase, ...], relation: str | None, task: str) -> None:
    read = parse(text)
    assert (read.phrases, read.relation, read.task) == (phrases, relation, task)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "a pink circle",
        "five circles",
        "a circle and",
        "circle",
        "a circle above a square below a triangle",
        "a circle above a square and a triangle",
        "a red circle, a blue square",
        "a photo of a circle",
    ],
)
def test_other_texts_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not one for images of shapes: write, for example,") as caught:
        parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("held_out", [False, True])
def test_balanced_prompts_take_the_same_number_of_each_task(held_out: bool) -> None:
    texts = balanced_prompts(5, held_out)
    assert [parse(text).task for text in texts] == [task for task in TASKS for _ in range(5)]
    assert len(set(texts)) == len(texts)
    pool = {p.text for t in TASKS for p in prompts(t, held_out)}
    assert set(texts) <= pool
    assert set(balanced_prompts(10_000, held_out)) == pool


# ------------------------------------------------------------------------------------------------------------- images


def test_images_have_the_colours_they_are_made_of() -> None:
    scene = Scene((SceneObject("square", "blue", 20.0, 40.0, 10.0),), BACKGROUNDS[0])
    image = render([scene])[0]
    assert image.shape == (3, 64, 64)
    assert image[:, 40, 20].tolist() == pytest.approx(PALETTE["blue"])
    assert image[:, 5, 60].tolist() == pytest.approx(BACKGROUNDS[0])


def test_shapes_are_found_where_they_were_drawn() -> None:
    objects = (
        SceneObject("circle", "red", 16.0, 14.0, 9.0),
        SceneObject("triangle", "green", 46.0, 20.0, 9.0),
        SceneObject("square", "purple", 30.0, 48.0, 9.0),
    )
    for background in BACKGROUNDS:
        image = render([Scene(objects, background)])[0].permute(1, 2, 0).numpy()
        found = {f.shape: f for f in find_shapes(image)}
        assert set(found) == {"circle", "triangle", "square"}
        for item in objects:
            seen = found[item.shape]
            assert seen.color == item.color
            assert (seen.x, seen.y) == pytest.approx((item.x, item.y), abs=2.5)
            assert seen.clarity > 0.85


def test_blank_and_noisy_images_hold_no_shapes() -> None:
    assert find_shapes(np.full((64, 64, 3), 0.9, dtype=np.float32)) == []
    noise = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
    assert [f for f in find_shapes(noise) if f.shape] == []
    graded, right = check(torch.from_numpy(noise).permute(2, 0, 1)[None], ["a square"])
    assert graded.item() == right.item() == 0


@pytest.mark.parametrize("task", TASKS)
def test_scenes_differ_with_their_random_numbers_alone(task: str) -> None:
    prompt = prompts(task, False)[0]
    assert make_scene(prompt, random.Random(1)) == make_scene(prompt, random.Random(1))
    assert make_scene(prompt, random.Random(1)) != make_scene(prompt, random.Random(2))


def test_a_scene_has_room_for_four_shapes() -> None:
    with pytest.raises(ValueError, match="asks for 5 shapes; a scene has room for 1 to 4"):
        make_scene(parse("two circles and three squares"), random.Random(0))


@pytest.mark.parametrize("task", TASKS)
def test_captions_without_noise_are_true_and_with_noise_often_false(task: str) -> None:
    rng = random.Random(0)
    scenes = [make_scene(p, rng) for p in some(task) for _ in range(2)]
    images = render(scenes)
    assert check(images, [caption(s, rng, noise=0.0) for s in scenes])[1].mean() == 1
    described = {describe(scene, rng).task for scene in scenes}
    wrong = 1 - check(images, [caption(s, rng, noise=1.0) for s in scenes])[1].mean().item()
    assert 0.1 < wrong < 0.6, described


def test_meaning_is_in_what_is_said_and_not_in_the_words() -> None:
    same = ["a circle above a square", "a drawing of a square below a circle"]
    assert meaning(parse(same[0])) == meaning(parse(same[1]))
    different = [
        "a circle above a square",
        "a square above a circle",
        "a circle and a square",
        "a circle to the left of a square",
        "a red circle and a square",
        "a circle and a red square",
        "two circles",
        "three circles",
    ]
    assert len({tuple(meaning(parse(text))) for text in different}) == len(different)


# ------------------------------------------------------------------------------------------------------------ checker


@pytest.mark.parametrize("task", TASKS)
def test_checker_passes_clean_images_and_fails_corrupted_ones(task: str) -> None:
    rng = random.Random(0)
    wanted = some(task)
    texts = [p.text for p in wanted]
    graded, right = check(render([make_scene(p, rng) for p in wanted]), texts)
    graded_wrong, right_wrong = check(render([make_scene(corrupt(p, rng), rng) for p in wanted]), texts)
    assert right.mean() >= 0.99
    assert right_wrong.mean() == 0
    for values in (graded, graded_wrong):
        assert values.min() >= 0
        assert values.max() <= 1
    assert graded.mean() > 0.9
    assert graded.mean() > graded_wrong.mean() + 0.2
    assert (graded > graded_wrong).float().mean() > 0.95
    assert {graded.dtype, right.dtype} == {torch.float32}


def make_image(*objects: SceneObject) -> torch.Tensor:
    return render([Scene(objects, BACKGROUNDS[0])])


def verdict(text: str, *objects: SceneObject) -> tuple[float, bool]:
    graded, right = check(make_image(*objects), [text])
    return graded.item(), bool(right.item())


RED_LEFT = SceneObject("circle", "red", 16.0, 32.0, 10.0)
BLUE_RIGHT = SceneObject("square", "blue", 48.0, 32.0, 10.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a circle and a square", True),
        ("a square and a circle", True),
        ("a red circle and a blue square", True),
        ("a blue circle and a red square", False),
        ("a circle to the left of a square", True),
        ("a circle to the right of a square", False),
        ("a square to the right of a circle", True),
        ("a circle above a square", False),
        ("a circle below a square", False),
        ("a circle", False),
        ("two circles", False),
        ("a triangle and a square", False),
    ],
)
def test_verdicts_on_one_image(text: str, expected: bool) -> None:
    graded, right = verdict(text, RED_LEFT, BLUE_RIGHT)
    assert right == expected
    assert graded > 0.9 if expected else graded < 0.85


def test_above_and_below() -> None:
    top, bottom = SceneObject("circle", "red", 32.0, 16.0, 10.0), SceneObject("square", "blue", 32.0, 48.0, 10.0)
    assert verdict("a circle above a square", top, bottom)[1]
    assert verdict("a square below a circle", top, bottom)[1]
    assert not verdict("a circle below a square", top, bottom)[1]
    assert not verdict("a circle to the left of a square", top, bottom)[1]


def test_grade_rises_with_every_demand_that_is_met() -> None:
    text = "a red circle and a blue square"
    nothing = verdict(text, SceneObject("triangle", "green", 32.0, 32.0, 10.0))[0]
    one = verdict(text, SceneObject("circle", "green", 16.0, 32.0, 10.0))[0]
    one_right = verdict(text, RED_LEFT)[0]
    two = verdict(text, RED_LEFT, SceneObject("square", "green", 48.0, 32.0, 10.0))[0]
    both = verdict(text, RED_LEFT, BLUE_RIGHT)[0]
    assert nothing == 0 < one < one_right < two < both <= 1


def test_grade_of_a_count_falls_with_its_distance() -> None:
    places = [(14.0, 14.0), (50.0, 14.0), (14.0, 50.0), (50.0, 50.0)]
    objects = [SceneObject("square", "red", x, y, 8.0) for x, y in places]
    grades = [verdict("three squares", *objects[:n])[0] for n in (1, 2, 3, 4)]
    assert grades[0] < grades[1] < grades[2] > grades[3]
    assert [verdict("three squares", *objects[:n])[1] for n in (1, 2, 3, 4)] == [False, False, True, False]


def test_further_shapes_cost() -> None:
    alone, with_another = verdict("a red circle", RED_LEFT), verdict("a red circle", RED_LEFT, BLUE_RIGHT)
    assert alone[1]
    assert not with_another[1]
    assert with_another[0] == pytest.approx(alone[0] / 2)


def test_batch_equals_singles() -> None:
    rng = random.Random(3)
    wanted = [p for task in TASKS for p in some(task, 4)]
    images, texts = render([make_scene(p, rng) for p in wanted]), [p.text for p in wanted]
    graded, right = check(images, texts)
    singles = [check(images[i : i + 1], texts[i : i + 1]) for i in range(len(texts))]
    assert torch.equal(graded, torch.cat([g for g, _ in singles]))
    assert torch.equal(right, torch.cat([r for _, r in singles]))


@pytest.mark.parametrize("task", TASKS)
def test_corruption_changes_the_content_and_not_the_words(task: str) -> None:
    rng = random.Random(5)
    for prompt in some(task, 60):
        wrong = corrupt(prompt, rng)
        assert wrong.text == prompt.text
        assert (wrong.phrases, wrong.relation) != (prompt.phrases, prompt.relation)
