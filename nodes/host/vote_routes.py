"""HTTP routes of votes, `/dancegrpo/votes/...`. They take names, never paths; only POST requests change anything."""

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
from aiohttp import web

from ...trainer.rewards.preference import PIXELS, load_backbone
from ...trainer.runs.vote_import import import_run
from ...trainer.utils.errors import BadInput
from ...trainer.votes import store
from ...trainer.votes.analysis import VoteAnalyzer
from ...trainer.votes.importing import export, import_favourites, import_folder
from ...trainer.votes.records import CollectedImage, Vote
from .folders import votes_folder
from .reward_files import backbone_file
from .routes import Routes
from .run_views import find as find_run

if TYPE_CHECKING:
    import numpy as np

KINDS = ("left", "right", "tie", "skip")
BASES = {"output": folder_paths.get_output_directory, "input": folder_paths.get_input_directory}


def add_vote_routes(routes: Routes) -> None:
    """Register every route of this file."""
    routes.get("/votes", _list)
    routes.get("/votes/{name}", _state)
    routes.get("/votes/{name}/pair", _pair)
    routes.get("/votes/{name}/images/{image}", _image)
    routes.post("/votes/{name}/create", _create)
    routes.post("/votes/{name}/vote", _vote)
    routes.post("/votes/{name}/undo", _undo)
    routes.post("/votes/{name}/import", _import)
    routes.post("/votes/{name}/export", _export)
    routes.post("/votes/{name}/delete", _delete)
    routes.post("/votes/{name}/restore", _restore)


def _describer(backbone: str) -> Any:
    """A function that computes the features of an image file with a backbone, which is loaded once."""
    module = load_backbone(backbone)

    def describe(path: Path) -> "np.ndarray":
        import torch

        from ...trainer.utils.media import read_image

        with torch.no_grad():
            return module(read_image(path)[None])[0].double().numpy()

    return describe


class _Backbones(dict):
    def __missing__(self, backbone: str) -> Any:
        self[backbone] = _describer(backbone)
        return self[backbone]


_analyzer = VoteAnalyzer(_Backbones().__getitem__)


def _collection(request: web.Request) -> store.Collection:
    return store.find(votes_folder(), request.match_info["name"])


def _backbone(request: web.Request) -> str:
    """The backbone whose features are used to choose pairs: `backbone` of the query, by default `pixels`."""
    return backbone_file(request.query.get("backbone", PIXELS))


def _list(request: web.Request, body: None) -> dict:
    found = [store.Collection(votes_folder() / name) for name in store.names(votes_folder())]
    return {"collections": [{"name": one.name, "images": len(one.files()), **one.vote_log().counts()} for one in found]}


def _state(request: web.Request, body: None) -> dict:
    return _analyzer.state(_collection(request), _backbone(request))


def _pair(request: web.Request, body: None) -> dict:
    return {"pair": _next_pair(request)}


def _next_pair(request: web.Request) -> dict | None:
    mode = request.query.get("mode", "active")
    if mode not in ("active", "random"):
        raise BadInput(f"mode is {mode[:40]!r}: choose active or random")
    repeat = request.query.get("repeat") == "true"
    found = _analyzer.next(_collection(request), _backbone(request), mode=mode, repeat=repeat)
    if not found:
        return None
    left, right = found[0]
    return {"id": uuid.uuid4().hex, "left": _shown(left), "right": _shown(right)}


def _shown(item: CollectedImage) -> dict:
    return {"image": item.image, "prompt": item.prompt}


def _image(request: web.Request, body: None) -> web.FileResponse:
    path = _collection(request).image_file(request.match_info["image"])
    kind = {".png": "image/png", ".webp": "image/webp"}.get(path.suffix.lower(), "image/jpeg")
    headers = {"Content-Type": kind, "X-Content-Type-Options": "nosniff", "Cache-Control": "max-age=86400, immutable"}
    return web.FileResponse(path, headers=headers)


def _create(request: web.Request, body: dict) -> dict:
    collection = store.create(votes_folder(), request.match_info["name"])
    return {"message": f"collection {collection.name} exists"}


def _vote(request: web.Request, body: dict) -> dict:
    collection = _collection(request)
    left, right, choice = body.get("left"), body.get("right"), body.get("choice")
    if choice not in KINDS:
        raise BadInput(f"choice is {str(choice)[:40]!r}: choose one of {', '.join(KINDS)}")
    better, worse = (right, left) if choice == "right" else (left, right)
    kind = choice if choice in ("tie", "skip") else "winner"
    collection.record([Vote(better, worse, kind, body.get("id"))])
    return _after(request, collection)


def _undo(request: web.Request, body: dict) -> dict:
    collection = _collection(request)
    undone = collection.undo(body.get("id") or uuid.uuid4().hex, body.get("vote"))
    return {"undone": undone, **_after(request, collection)}


def _after(request: web.Request, collection: store.Collection) -> dict:
    return {"state": _analyzer.state(collection, _backbone(request)), "pair": _next_pair(request)}


def _import(request: web.Request, body: dict) -> dict:
    """Add the samples of a run; or the images of a folder of ComfyUI's; or of two, of which one holds better ones."""
    if "run" in body:
        return _import_run(request, body)
    base, prompt = body.get("base", "output"), str(body.get("prompt") or "")
    fields = ("better", "worse") if "better" in body or "worse" in body else ("folder",)
    folders = [_inside(base, body.get(field), field) for field in fields]
    collection = store.create(votes_folder(), request.match_info["name"])
    done = (import_folder if len(folders) == 1 else import_favourites)(collection, *folders, prompt)
    parts = [f"{done.new} images added", f"{done.known} already in the collection"]
    parts += [f"{done.votes} votes added"] if done.votes else []
    parts += [f"{len(done.complaints)} files skipped"] if done.complaints else []
    return {"message": ", ".join(parts), "warnings": done.complaints}


def _import_run(request: web.Request, body: dict) -> dict:
    iteration = body.get("iteration")
    if iteration is not None and (isinstance(iteration, bool) or not isinstance(iteration, int) or iteration < 0):
        raise BadInput(
            f"iteration is {str(iteration)[:40]!r}: it must be a whole number, 0 or more, or null for the newest"
        )
    run = find_run(body["run"])
    collection = store.create(votes_folder(), request.match_info["name"])
    done = import_run(collection, run, body.get("kind", "rollout"), iteration)
    added = f"{done.new} images of run {run.path.name} added to {collection.name}, {done.known} already in it"
    return {"message": added, "warnings": []}


def _export(request: web.Request, body: dict) -> dict:
    """Write a collection as a ZIP file into ComfyUI's output folder."""
    collection = _collection(request)
    file = votes_folder().parent / "exports" / f"{collection.name}.zip"
    file.parent.mkdir(parents=True, exist_ok=True)
    export(collection, file)
    return {"filename": file.name, "subfolder": "dancegrpo/exports", "type": "output"}


def _inside(base: object, folder: object, field: str) -> Path:
    """A folder inside ComfyUI's input or output folder.

    Raises:
        BadInput: it is outside of it.
    """
    if base not in BASES:
        raise BadInput(f"base is {str(base)[:40]!r}: choose output or input")
    if not isinstance(folder, str) or not folder or "\0" in folder:
        raise BadInput(f"{field} is empty: give a folder inside ComfyUI's input or output folder")
    root = Path(BASES[base]()).resolve()
    path = (root / folder).resolve()
    if not path.is_relative_to(root):
        raise BadInput(f"{field} {folder[:80]!r} is not inside ComfyUI's {base} folder")
    return path


def _delete(request: web.Request, body: dict) -> dict:
    store.delete(votes_folder(), request.match_info["name"])
    return {"message": f"collection {request.match_info['name']} was deleted; it can be restored"}


def _restore(request: web.Request, body: dict) -> dict:
    return {"message": f"collection {store.restore(votes_folder(), request.match_info['name']).name} was restored"}
