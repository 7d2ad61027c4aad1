"""GenEval-like: its questions on objects given by hand, and on a tiny random detector in a real folder."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from clip_reference import TINY, open_clip_shapes, random_weights, to_transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.config import RewardConfig
from trainer.rewards import Reward, load_reward, score
from trainer.rewards.geneval_like import (
    Detection,
    GenEvalLike,
    check_classes,
    cut_out,
    geneval_name,
    graded,
    relations,
    right,
)
from trainer.utils.errors import BadInput


def found(left: float, top: float, right_: float, bottom: float) -> Detection:
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[int(top) : int(bottom), int(left) : int(right_)] = True
    return Detection((left, top, right_, bottom), mask)


A, B, C = found(0, 40, 20, 60), found(60, 40, 80, 60), found(5, 0, 25, 20)


def no_color(objects: list, name: str) -> list[str]:
    raise AssertionError("nobody asked for a colour")


def test_relations_leave_a_margin() -> None:
    assert relations(A, B) == {"left of"}
    assert relations(B, A) == {"right of"}
    assert relations(C, A) == {"above"}
    assert relations(A, C) == {"below"}
    assert relations(A, found(40, 80, 60, 100)) == {"left of", "above"}
    assert relations(A, A) == set()
    assert relations(A, found(3, 42, 23, 62)) == set()


def include(**clause: object) -> dict:
    return {"include": [{"class": "dog", "count": 1, **clause}]}


def test_numbers() -> None:
    one, two, three = {"dog": [A]}, {"dog": [A, B]}, {"dog": [A, B, C]}
    counting = {**include(count=2), "exclude": [{"class": "dog", "count": 3}]}
    assert [right(f, counting, no_color) for f in ({}, one, two, three)] == [0, 0, 1, 0]
    assert [graded(f, counting, no_color) for f in ({}, one, two, three)] == [0, 0.5, 1, 0.5]
    assert [right(f, include(), no_color) for f in ({}, one, three)] == [0, 1, 1]
    assert graded(three, include(), no_color) == 0  # never below


def test_colors_of_the_surest_objects() -> None:
    def colors(objects: list, name: str) -> list[str]:
        assert name == "dog"
        return ["red" if each is A else "blue" for each in objects]

    red = include(color="red")
    assert right({"dog": [A, B]}, red, colors) == 1
    assert right({"dog": [B, A]}, red, colors) == 0
    assert graded({"dog": [A]}, red, colors) == 1
    assert graded({"dog": [B]}, red, colors) == 0.5
    assert graded({}, red, colors) == 0


def test_places() -> None:
    question = {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}
    assert right({"dog": [A], "cat": [B]}, question, no_color) == 1
    assert right({"dog": [B], "cat": [A]}, question, no_color) == 0
    assert right({"dog": [A]}, question, no_color) == 0
    assert graded({"dog": [B], "cat": [A]}, question, no_color) == pytest.approx(2 / 3)
    assert graded({"dog": [A]}, question, no_color) == pytest.approx(1 / 3)


def test_an_object_is_cut_out_on_grey() -> None:
    image, mask = torch.rand(3, 100, 100), torch.zeros(100, 100, dtype=torch.bool)
    mask[10:20, 30:50] = True
    mask[10, 30] = False
    crop = cut_out(image, Detection((30, 10, 50, 20), mask))
    assert crop.shape == (3, 10, 20)
    assert torch.equal(crop[:, 5, 5], image[:, 15, 35])
    torch.testing.assert_close(crop[:, 0, 0], torch.full((3,), 0.6))


# ------------------------------------------------------------------------------------------------------ a real folder


LABELS = ("dog", "cat", "sofa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    folder = tmp_path_factory.mktemp("geneval")
    backbone = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
                          out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6,
        num_labels=3, id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder / "detector")
    (folder / "tiny-quickgelu-colors.json").write_text(json.dumps({**TINY, "quick_gelu": True}))
    open_clip.add_model_config(folder / "tiny-quickgelu-colors.json")
    save_file(to_transformers(random_weights(open_clip_shapes(TINY))), folder / "clip.safetensors")
    lines = [
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"},
        {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a red cat"},
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


@pytest.fixture(autouse=True)
def at_tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenEvalLike, "network", "tiny-quickgelu-colors")


def reward(folder: Path, **options: object) -> Reward:
    files = {"detector": "detector", "clip": "clip.safetensors", "prompts": "prompts.jsonl"}
    files = {name: str(folder / file) for name, file in files.items()}
    return load_reward(RewardConfig(name="geneval-like", options={**files, **options}))


def make_images() -> Tensor:
    return torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(0))


def test_a_batch_equals_singles(folder: Path) -> None:
    tested = reward(folder, threshold=0.01, counting=0.01)
    tested.check_prompts(["two dogs", "a red cat"])
    together = score(tested, make_images(), ["two dogs", "a red cat"])
    alone = [
        score(tested, image[None], [text]).item()
        for image, text in zip(make_images(), ["two dogs", "a red cat"], strict=True)
    ]
    assert together.tolist() == pytest.approx(alone)
    with pytest.raises(ValueError, match="'a dog' is not one of the prompts"):
        tested.check_prompts(["a dog"])


def test_objects_and_masks_are_those_of_transformers(folder: Path) -> None:
    from transformers import Mask2FormerImageProcessor

    tested = reward(folder)
    tested.load()
    processor = Mask2FormerImageProcessor(size={"height": 384, "width": 384}, ignore_index=255)
    image = (make_images()[0] * 255).round() / 255
    inputs = processor(images=[(image * 255).byte().permute(1, 2, 0).numpy()], return_tensors="pt")
    with torch.no_grad():
        output = tested.module["detector"](pixel_values=inputs["pixel_values"])
        mine = tested.detect(image, 0.0)
    wanted = processor.post_process_instance_segmentation(
        output, threshold=0.0, target_sizes=[(40, 60)], return_binary_maps=True
    )[0]
    names = {0: "dog", 1: "cat", 2: "couch"}
    counts = {name: sum(names[s["label_id"]] == name for s in wanted["segments_info"]) for name in names.values()}
    assert {name: len(mine.get(name, [])) for name in names.values()} == counts
    masks = [entry.mask for group in mine.values() for entry in group]
    for segment, mask in zip(wanted["segments_info"], wanted["segmentation"], strict=True):
        assert max((mask.bool() == other).float().mean() for other in masks) > 0.98, segment


COCO = """person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter
bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis
snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork
knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed
dining_table toilet tv laptop mouse remote keyboard cell_phone microwave oven toaster sink refrigerator book clock vase
scissors teddy_bear hair_drier toothbrush"""
VOC = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant"}
VOC |= {"dining table": "diningtable", "tv": "tvmonitor"}
GENEVAL = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}


@pytest.mark.parametrize("spelled", [{}, VOC], ids=["COCO's labels", "labels of mmdetection"])
def test_every_object_of_geneval_has_a_class_of_the_detector(spelled: dict[str, str]) -> None:
    coco = [name.replace("_", " ") for name in COCO.split()]
    labels, asked = [spelled.get(name, name) for name in coco], [GENEVAL.get(name, name) for name in coco]
    assert len(set(coco)) == 80
    questions = [{"prompt": name, "include": [{"class": name, "count": 1}]} for name in asked]
    check_classes(questions, labels, "prompts.jsonl")
    assert [geneval_name(label) for label in labels] == asked


def test_an_object_that_the_detector_does_not_know_is_bad_input(folder: Path, tmp_path: Path) -> None:
    clauses = {"include": [{"class": "dog", "count": 1}], "exclude": [{"class": "unicorn", "count": 1}]}
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "a dog", **clauses}) + "\n")
    with pytest.raises(BadInput, match="'a dog' in .*other.jsonl asks for 'unicorn', which is none of the detector's"):
        reward(folder, prompts=str(tmp_path / "other.jsonl")).load()


def test_buffers_of_published_files_are_ignored(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Older transformers wrote the table of relative positions; the loss's class weights may be missing."""
    import shutil

    shutil.copytree(folder / "detector", tmp_path / "detector")
    file = tmp_path / "detector" / "model.safetensors"
    weights = load_file(file)
    tables = [key for key in weights if key.endswith("relative_position_bias_table")]
    assert tables
    older = weights | {key.replace("bias_table", "index"): torch.zeros(16, 16, dtype=torch.long) for key in tables}
    del older["criterion.empty_weight"]
    save_file(older, file, metadata={"format": "pt"})
    capfd.readouterr()
    changed, plain = reward(folder, detector=str(tmp_path / "detector")), reward(folder)
    for tested in (changed, plain):
        tested.load()
    for key, value in plain.module.named_parameters():
        assert torch.equal(dict(changed.module.named_parameters())[key], value), key
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    save_file({**older, "model.other.weight": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="model.other.weight is missing or unexpected"):
        reward(folder, detector=str(tmp_path / "detector")).load()
    del older["class_predictor.weight"]
    save_file(older, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="class_predictor.weight is missing or unexpected"):
        reward(folder, detector=str(tmp_path / "detector")).load()


def test_wrong_files_are_bad_input(folder: Path, tmp_path: Path) -> None:
    clause = {"class": "dog", "count": 1}
    for text in (
        '{"text": "x"}',
        "[" * 10**5,
        json.dumps({"prompt": "a", "include": []}),
        json.dumps({"prompt": "a", "include": [{"class": "dog"}]}),
        json.dumps({"prompt": "a", "include": [{**clause, "count": 0}]}),
        json.dumps({"prompt": "a", "include": [{**clause, "position": ["left of", 0]}]}),
        json.dumps({"prompt": "a", "include": [clause], "exclude": [{"class": "dog", "count": 0}]}),
    ):
        (tmp_path / "other.jsonl").write_text(text + "\n")
        with pytest.raises(BadInput, match="other.jsonl is not a list of GenEval's prompts"):
            reward(folder, prompts=str(tmp_path / "other.jsonl"))
    (tmp_path / "detector").mkdir()
    with pytest.raises(BadInput, match="detector is not a Mask2Former"):
        reward(folder, detector=str(tmp_path / "detector")).load()
    with pytest.raises(BadInput, match="is a file, but a folder is expected"):
        reward(folder, detector=str(folder / "clip.safetensors"))
