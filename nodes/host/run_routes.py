"""HTTP routes of runs, `/dancegrpo/runs/...`. They take names, never paths; only POST requests change anything."""

import zlib

from aiohttp import web

from ...trainer.runs import launch
from ...trainer.utils.errors import BadInput
from . import live_preview, runs
from . import run_views as views
from .folders import publish_loras
from .progress import GRACE
from .routes import Routes, number

_cache = views.EventCache()


def add_run_routes(routes: Routes) -> None:
    """Register every route of this file."""
    routes.get("/runs", _list)
    routes.get("/runs/{name}", _detail)
    routes.get("/runs/{name}/events", _events)
    routes.get("/runs/{name}/log", _log)
    routes.get("/runs/{name}/description", _description)
    routes.get("/runs/{name}/preview", _preview)
    routes.get("/runs/{name}/samples", _samples)
    routes.get("/runs/{name}/samples/{file}", _sample)
    routes.post("/runs/{name}/stop", _stop)
    routes.post("/runs/{name}/publish", _publish)
    routes.post("/runs/{name}/resume", _resume)
    routes.post("/runs/{name}/delete", _delete)
    routes.post("/deleted/{name}/restore", _restore)


def _list(request: web.Request, body: None) -> dict:
    return {"runs": views.list_runs(), "deleted": views.deleted()}


def _detail(request: web.Request, body: None) -> dict:
    return views.detail(views.find(request.match_info["name"]))


def _events(request: web.Request, body: None) -> dict:
    run = views.find(request.match_info["name"])
    generation = request.query.get("generation")
    return _cache.events(run, number(request, "after"), None if generation is None else number(request, "generation"))


def _log(request: web.Request, body: None) -> dict:
    return views.log(views.find(request.match_info["name"]), number(request, "offset"))


def _description(request: web.Request, body: None) -> dict:
    return {"text": views.description(views.find(request.match_info["name"]))}


def _preview(request: web.Request, body: None) -> web.Response:
    content = live_preview.as_jpeg(views.find(request.match_info["name"]))
    headers = {"ETag": f'"{zlib.crc32(content):08x}"', "Cache-Control": "no-store"}
    return web.Response(body=content, content_type="image/jpeg", headers=headers)


def _samples(request: web.Request, body: None) -> dict:
    return {"samples": views.samples(views.find(request.match_info["name"]))}


def _sample(request: web.Request, body: None) -> web.FileResponse:
    path = views.sample_file(views.find(request.match_info["name"]), request.match_info["file"])
    kind = "video/mp4" if path.suffix == ".mp4" else "image/png"
    return web.FileResponse(path, headers={"Content-Type": kind, "X-Content-Type-Options": "nosniff"})


def _stop(request: web.Request, body: dict) -> dict:
    run = views.find(request.match_info["name"])
    stopped = launch.stop(run, grace=GRACE)
    if stopped and run.lora_file.exists():
        publish_loras(run.lora_file, run.path.name)
    return {"message": f"run {run.path.name} was {'stopped' if stopped else 'not running'}"}


def _publish(request: web.Request, body: dict) -> dict:
    """Copy the newest LoRA of a run that has ended to where ComfyUI lists it."""
    run = views.find(request.match_info["name"])
    if launch.is_running(run):
        raise BadInput(f"run {run.path.name!r} is running: its LoRA can be put into ComfyUI's list when it has ended")
    if not run.lora_file.exists():
        raise BadInput(f"run {run.path.name!r} has no LoRA")
    names = publish_loras(run.lora_file, run.path.name)
    return {"message": f"in ComfyUI's list of LoRAs: {', '.join(names)}", "lora_names": names}


def _resume(request: web.Request, body: dict) -> dict:
    run = views.find(request.match_info["name"])
    started = runs.resume(run)
    return {"message": f"run {run.path.name} {'resumes' if started else 'has nothing left to do'}"}


def _delete(request: web.Request, body: dict) -> dict:
    name = views.delete(views.find(request.match_info["name"]))
    return {"message": f"moved to output/dancegrpo/deleted/{name}; it can be restored"}


def _restore(request: web.Request, body: dict) -> dict:
    return {"message": f"run {views.restore(request.match_info['name'])} was restored"}
