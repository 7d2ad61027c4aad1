"""GenEval's checks with a detector of the same kind from transformers; not the official metric."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.functional import normalize as unit

from ..config import Section
from ..utils.errors import BadInput
from ..utils.media import to_tensor
from .base import Dtype, ModelReward, dtype_option
from .clip.contrastive import architecture, open_clip_network
from .clip.layout import from_transformers
from .clip.text import tokenizer
from .files import build, file_option, fill, read_weights
from .preprocess import normalize, shortest_and_crop, to_pil

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GENEVAL_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""GenEval's names where a detector's labels differ: COCO's own, and Pascal VOC's, which configurations that were
converted from mmdetection have."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE, MARGIN, MOST = 384, 0.1, 16
UNUSED = r"relative_position_index$|^criterion\.empty_weight$"
"""Buffers of published files that are not used: a table that transformers computes, and weights of the loss."""


@dataclass(frozen=True)
class Detection:
    """A detected object: left, top, right, bottom in pixels, and its mask `[H, W]` bool."""

    box: tuple[float, float, float, float]
    mask: Tensor


class GenEvalLike(ModelReward):
    """GenEval's checks (objects, counts, colours, positions) with the Mask2Former detector of transformers.

    This is not GenEval's official metric, which needs its own detector and environment (see external-scorers.md). The
    detector has the same architecture but other weights, and its confidences have another scale, so adjust `threshold`
    and `counting` on your own images. Every prompt must be one of GenEval's. `graded` gives partial credit, which is a
    denser signal than right or wrong.
    """

    name = "geneval-like"
    typical_range = (0.0, 1.0)
    licence = "MIT; detector: see its page"
    network = "ViT-L-14-quickgelu"
    batch_size = 4

    class Options(Section):
        detector: str = file_option(
            "geneval/mask2former-swin-small-coco-instance",
            "Folder of facebook/mask2former-swin-small-coco-instance on the Hugging Face hub: config.json and "
            "model.safetensors (0.3 GB).",
            suffixes=(),
            folder=True,
        )
        clip: str = file_option(
            "geneval/clip-vit-large-patch14.safetensors",
            "model.safetensors of openai/clip-vit-large-patch14 on the Hugging Face hub (1.7 GB), for colours.",
        )
        prompts: str = file_option(
            "geneval/evaluation_metadata.jsonl",
            "prompts/evaluation_metadata.jsonl of djghosh13/geneval on GitHub.",
            suffixes=(".jsonl",),
        )
        threshold: Annotated[float, Field(gt=0, lt=1)] = Field(
            0.3, description="Smallest confidence of a detected object."
        )
        counting: Annotated[float, Field(gt=0, lt=1)] = Field(
            0.9, description="The same for prompts that ask for a number of objects."
        )
        graded: bool = Field(True, description="Give partial credit; else the score is 0 or 1.")
        dtype: Dtype = dtype_option(gpu="float32")

    def __init__(self, options: Section | None = None) -> None:
        super().__init__(options)
        self.asked = read_questions(Path(self.options.prompts))
        self.colors: dict[str, Tensor] = {}

    def check_prompts(self, prompts: list[str]) -> None:
        for prompt in prompts:
            if prompt not in self.asked:
                raise ValueError(f"{prompt[:100]!r} is not one of the prompts in {self.options.prompts}")

    def weight_files(self) -> list[Path]:
        return [Path(self.options.clip), Path(self.options.detector) / "model.safetensors"]

    def build(self) -> nn.Module:
        path, config, what = Path(self.options.clip), architecture(self.network), "OpenAI's CLIP ViT-L/14"
        self.size = config["vision_cfg"]["image_size"]
        detector = load_detector(Path(self.options.detector))
        check_classes(self.asked.values(), detector.config.id2label.values(), self.options.prompts)
        clip = build(lambda: open_clip_network(config))
        fill(clip, from_transformers(read_weights(path), path, what), path, what)
        return nn.ModuleDict({"clip": clip, "detector": detector})

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.check_prompts(prompts)
        return torch.tensor(
            [self._score(image, self.asked[prompt]) for image, prompt in zip(images, prompts, strict=True)]
        )

    def _score(self, image: Tensor, question: dict[str, Any]) -> float:
        least = self.options.counting if question.get("tag") == "counting" else self.options.threshold
        found = self.detect(image, least)
        grade = graded if self.options.graded else right
        return grade(found, question, lambda objects, name: self.color(image, objects, name))

    def detect(self, image: Tensor, least: float) -> dict[str, list[Detection]]:
        """Objects by GenEval's name, the most confident first, at most 16 of each.

        Args:
            least: smallest confidence.
        """
        from PIL import Image

        resized = to_pil(image[None])[0].resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        pixels = normalize(to_tensor(resized), MEAN, STD)[None].to(image.device)
        output = self.module["detector"](pixel_values=pixels.to(self.dtype))
        masks = output.masks_queries_logits.float()
        masks = interpolate(masks, (SIDE, SIDE), mode="bilinear", align_corners=False)[0]
        probabilities = output.class_queries_logits[0].float().softmax(-1)[:, :-1]
        values, chosen = probabilities.flatten().topk(len(probabilities))
        masks, labels = masks[chosen // probabilities.shape[1]], chosen % probabilities.shape[1]
        inside = (masks > 0).flatten(1).float()
        values = values * (masks.sigmoid().flatten(1) * inside).sum(1) / (inside.sum(1) + 1e-6)
        full = interpolate((masks > 0).float()[None], image.shape[-2:], mode="nearest")[0].bool()
        names = self.module["detector"].config.id2label
        found: dict[str, list[Detection]] = {}
        for i in values.argsort(descending=True, stable=True).tolist():
            group = found.setdefault(geneval_name(names[labels[i].item()]), [])
            if values[i] > least and full[i].any() and len(group) < MOST:
                group.append(Detection(_box(full[i]), full[i].cpu()))
        return found

    def color(self, image: Tensor, objects: list[Detection], name: str) -> list[str]:
        """Classify the colour of each object with CLIP, on a grey background."""
        crops = [cut_out(image, found) for found in objects]
        pixels = torch.cat([normalize(shortest_and_crop(crop[None], self.size)) for crop in crops]).to(image.device)
        features = unit(self.module["clip"].encode_image(pixels.to(self.dtype)).float(), dim=-1)
        return [COLORS[i] for i in (features @ self._colors_of(name, image.device).T).argmax(1).tolist()]

    def _colors_of(self, name: str, device: torch.device) -> Tensor:
        if name not in self.colors:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            tokens = tokenizer()(texts, context_length=77).to(device)
            features = unit(self.module["clip"].encode_text(tokens).float(), dim=-1)
            self.colors[name] = unit(features.view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1).cpu()
        return self.colors[name].to(device)


def load_detector(folder: Path) -> nn.Module:
    """Load the Mask2Former in a folder, float32 on the CPU.

    Raises:
        BadInput: the folder does not contain one.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    class Detector(Mask2FormerForUniversalSegmentation):
        _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [UNUSED]
        _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [UNUSED]

    try:
        model, info = Detector.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise BadInput(f"{folder} is not a Mask2Former: {' '.join(str(error).split())[:200]}") from error
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    if wrong:
        raise BadInput(f"{folder} is not a Mask2Former: {wrong[0]} is missing or unexpected")
    return model


def geneval_name(label: str) -> str:
    """GenEval's name of a detector's class."""
    return GENEVAL_NAMES.get(label, label)


def check_classes(questions: Iterable[dict[str, Any]], labels: Iterable[str], file: str) -> None:
    """
    Raises:
        BadInput: a prompt asks for an object that is none of the detector's classes, so that it would never be found.
    """
    known = {geneval_name(label) for label in labels}
    for question in questions:
        for clause in (*question["include"], *question.get("exclude", [])):
            if clause["class"] not in known:
                raise BadInput(
                    f"{question['prompt'][:100]!r} in {file} asks for {clause['class'][:40]!r}, which is none of the "
                    "detector's classes (id2label in its config.json): use a detector of COCO's 80 classes"
                )


def read_questions(path: Path) -> dict[str, dict[str, Any]]:
    """Read GenEval's prompts with their clauses.

    Raises:
        BadInput: the file has another format.
    """
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        return {str(entry["prompt"]): _checked(entry) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{path} is not a list of GenEval's prompts: {repr(error)[:200]}") from error


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """Validate the clauses of a prompt."""
    for number, clause in enumerate(entry["include"]):
        if clause["count"] < 1 or ("position" in clause and not 0 <= clause["position"][1] < number):
            raise ValueError(f"clause {number + 1} of {entry['prompt']!r}")
    if any(clause["count"] < 1 or not clause["class"] for clause in entry.get("exclude", [])) or not entry["include"]:
        raise ValueError(f"the clauses of {entry['prompt']!r}")
    return entry


def cut_out(image: Tensor, found: Detection) -> Tensor:
    """Crop an object, on a grey background (#999), `[3, h, w]`."""
    left, top, right_, bottom = (int(side) for side in found.box)
    alone = torch.where(found.mask.to(image.device), image, 0x99 / 255)
    return alone[:, top:bottom, left:right_]


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return (columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1)


# ------------------------------------------------------------------------------------------------------------ grading


def right(found: dict[str, list[Detection]], question: dict, color_of: Any) -> float:
    """1 if the image satisfies all clauses, by GenEval's rules, else 0.

    Args:
        color_of: classifies the colours of objects, given the name of their class.
    """
    groups: list[list[Detection] | None] = []
    for clause in question["include"]:
        objects = _of(found, clause)[: clause["count"]]
        fits = len(objects) >= clause["count"]
        if fits and "color" in clause:
            fits = color_of(objects, clause["class"]).count(clause["color"]) >= clause["count"]
        if fits and "position" in clause:
            where, other = clause["position"]
            fits = groups[other] is not None and all(where in relations(a, b) for a in objects for b in groups[other])
        groups.append(objects if fits else None)
    too_many = any(len(_of(found, clause)) >= clause["count"] for clause in question.get("exclude", []))
    return float(not too_many and None not in groups)


def graded(found: dict[str, list[Detection]], question: dict, color_of: Any) -> float:
    """Mean over the clauses: partial credit for counts and colours; positions are right or wrong."""
    parts: list[float] = []
    groups: list[list[Detection]] = []
    for clause in question["include"]:
        objects, count = _of(found, clause), clause["count"]
        parts.append(_nearness(len(objects), count))
        if "color" in clause:
            colors = color_of(objects, clause["class"]) if objects else []
            parts.append(_nearness(colors.count(clause["color"]), count))
        if "position" in clause:
            where, other = clause["position"]
            pairs = [(a, b) for a in objects[:count] for b in groups[other]]
            parts.append(float(bool(pairs) and all(where in relations(a, b) for a, b in pairs)))
        groups.append(objects[:count])
    return sum(parts) / len(parts)


def _of(found: dict[str, list[Detection]], clause: dict) -> list[Detection]:
    return found.get(clause["class"], [])


def _nearness(count: int, wanted: int) -> float:
    return max(0.0, 1 - abs(wanted - count) / wanted)


def relations(first: Detection, second: Detection) -> set[str]:
    """Where the first object lies relative to the second, with a margin of a tenth of their sizes (GenEval)."""
    offsets, moved = [], []
    for axis in (0, 1):
        (a0, a1), (b0, b1) = ((found.box[axis], found.box[axis + 2]) for found in (first, second))
        offset = (a0 + a1 - b0 - b1) / 2
        rest = max(abs(offset) - MARGIN * (abs(a1 - a0) + abs(b1 - b0)), 0.0)
        offsets.append(offset)
        moved.append(rest if offset > 0 else -rest)
    length = (offsets[0] ** 2 + offsets[1] ** 2) ** 0.5
    if max(map(abs, moved)) < 1e-3:
        return set()
    x, y = (value / length for value in moved)
    sides = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {side for side, true in sides.items() if true}
