"""Routes of collections: `/dancegrpo/votes/...`. Documented in docs/votes.md."""

import functools
import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np

from ...trainer.utils.errors import BadInput
from ...trainer.utils.media import open_image, read_image
from ...trainer.utils.names import check_name
from ...trainer.votes import store
from ...trainer.votes.analysis import Analyst
from ...trainer.votes.importing import export, import_favourites, import_folder
from ...trainer.votes.records import Item, Vote
from ...trainer.votes.store import Collection
from .routes import Call, File, get, post
from .votes import PIXELS, backbone_file, backbones, votes_folder

THUMBNAIL = 320
"""Pixels of its longer side."""
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
YEAR = 31_536_000
MOST_PAIRS = 20
SOURCES = {"input": folder_paths.get_input_directory, "output": folder_paths.get_output_directory}


# ------------------------------------------------------------------------------------------------------------- reading


@get("/votes")
def list_collections(call: Call) -> dict[str, Any]:
    """All collections with their counts, and the backbones that can be chosen."""
    found = [Collection(votes_folder() / name) for name in store.names(votes_folder())]
    rows = [{"name": c.name, "images": len(c.items()[0]), "votes": c.ledger().counts()} for c in found]
    return {"collections": rows, "backbones": backbones()}


@get("/votes/{name}")
def show(call: Call) -> dict[str, Any]:
    """Counts, agreement and warnings of one collection."""
    return analyst().state(_collection(call), _backbone(call))


@get("/votes/{name}/next")
def next_pairs(call: Call) -> dict[str, Any]:
    """The next pairs to vote on."""
    pairs = analyst().next(
        _collection(call),
        _backbone(call),
        count=call.number("count", 1, MOST_PAIRS, default=1),
        mode=call.choice("mode", ("active", "random"), "active"),
        repeat=call.choice("repeat", ("0", "1"), "0") == "1",
        exclude=_excluded(call.text("exclude", "")),
    )
    return {"pairs": [{"left": _shown(left), "right": _shown(right)} for left, right in pairs]}


def _shown(item: Item) -> dict[str, str]:
    return {"image": item.image, "prompt": item.prompt}


def _excluded(text: str) -> list[tuple[str, str]]:
    """Pairs written as `a.png:b.png,c.png:d.png`."""
    pairs = [tuple(words.split(":")) for words in text.split(",") if words]
    if any(len(pair) != 2 for pair in pairs):
        raise BadInput("exclude must be pairs of image names, such as a.png:b.png,c.png:d.png")
    return pairs


@get("/votes/{name}/images/{image}")
def show_image(call: Call) -> File:
    """An image, or its thumbnail as JPEG."""
    path = _collection(call).image_file(call.names["image"])
    if call.choice("size", ("full", "thumb"), "full") == "full":
        return File(path.read_bytes(), TYPES[path.suffix.lower()], seconds=YEAR)
    picture, buffer = open_image(path, path.name), io.BytesIO()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(buffer, "JPEG", quality=88)
    return File(buffer.getvalue(), "image/jpeg", seconds=YEAR)


# -------------------------------------------------------------------------------------------------------------- voting


@post("/votes/{name}/vote")
def vote(call: Call) -> dict[str, Any]:
    """Record a vote. It is on disk when the answer is sent; a repeated id is counted once."""
    choice = call.choice("choice", ("left", "right", "tie", "skip"))
    pair = [call.text("left"), call.text("right")]
    better, worse = pair[::-1] if choice == "right" else pair
    kind = choice if choice in ("tie", "skip") else "winner"
    collection = _collection(call)
    new = collection.record([Vote(better, worse, kind, call.text("id"))])
    return {"counted": bool(new), "votes": collection.ledger().counts()}


@post("/votes/{name}/undo")
def undo(call: Call) -> dict[str, Any]:
    """Take back a vote by its id, or the newest."""
    collection = _collection(call)
    undone = collection.undo(call.text("id"), call.text("vote") if "vote" in call.fields else None)
    return {"undone": undone, "votes": collection.ledger().counts()}


# --------------------------------------------------------------------------------------------------------- collections


@post("/votes/{name}/create")
def create(call: Call) -> dict[str, Any]:
    """Make an empty collection, or leave one of that name as it is."""
    return {"name": store.create(votes_folder(), call.names["name"]).name}


@post("/votes/{name}/delete")
def delete(call: Call) -> dict[str, Any]:
    """Move a collection to the bin."""
    store.delete(votes_folder(), call.names["name"])
    return {"deleted": call.names["name"]}


@post("/votes/{name}/restore")
def restore(call: Call) -> dict[str, Any]:
    """Bring back the collection of that name that was deleted last."""
    return {"name": store.restore(votes_folder(), call.names["name"]).name}


@post("/votes/{name}/import")
def import_images(call: Call) -> dict[str, Any]:
    """Add the images of a folder inside ComfyUI's input or output; or of two, of which one is better."""
    root = Path(SOURCES[call.choice("from", tuple(SOURCES))]())
    prompt, collection = call.text("prompt", ""), _collection(call)
    if "folder" in call.fields:
        return asdict(import_folder(collection, _subfolder(root, call.text("folder")), prompt))
    better, worse = (_subfolder(root, call.text(side)) for side in ("better", "worse"))
    return asdict(import_favourites(collection, better, worse, prompt))


@post("/votes/{name}/export")
def export_collection(call: Call) -> dict[str, Any]:
    """Write a ZIP file into ComfyUI's output folder, from where `/view` serves it."""
    collection = _collection(call)
    file = votes_folder().parent / "exports" / f"{collection.name}.zip"
    export(collection, file)
    return {"filename": file.name, "subfolder": "dancegrpo/exports", "type": "output"}


# ------------------------------------------------------------------------------------------------------------- helpers


def _collection(call: Call) -> Collection:
    return store.find(votes_folder(), call.names["name"])


def _backbone(call: Call) -> str:
    return call.choice("backbone", backbones(), PIXELS)


def _subfolder(root: Path, name: str) -> Path:
    """A folder below ComfyUI's input or output, by its name or by names with `/` between them.

    Raises:
        BadInput: a name cannot be one, or a link leads out.
    """
    folder = root.joinpath(*(check_name(part, "folder") for part in name.split("/")))
    if not folder.resolve().is_relative_to(root.resolve()):
        raise BadInput(f"folder {name!r} is a link that leads out of {root.name}")
    return folder


@functools.cache
def analyst() -> Analyst:
    """What is known of all collections, for as long as the server runs."""
    return Analyst(_describe)


@functools.lru_cache(maxsize=1)
def _describe(backbone: str) -> Callable[[Path], np.ndarray]:
    """Features by a backbone, on the CPU, so that a running graph keeps its memory. The newest backbone is kept."""
    import torch

    from ...trainer.rewards.preference import load_backbone

    network = load_backbone(backbone_file(backbone)).eval()

    def describe(path: Path) -> np.ndarray:
        with torch.no_grad():
            return network(read_image(path)[None])[0].double().numpy()

    return describe
