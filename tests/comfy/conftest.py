"""Tests against the real ComfyUI; skipped, with the reason, where there is none."""

from collections.abc import Iterator

import pytest
from comfy_host import Server, absence, warnings_of_pack

collect_ignore = ["inside"]  # what runs in a process that imports ComfyUI: see test_inside.py


@pytest.fixture(scope="session", autouse=True)
def comfyui_is_here() -> None:
    reason = absence()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running ComfyUI, common to all tests of the session; nothing of the pack may have warned at its end."""
    server = Server(tmp_path_factory.mktemp("comfyui")).start()
    yield server
    server.stop()
    assert warnings_of_pack(server.output) == []
    assert "lora key not loaded" not in server.output


@pytest.fixture(scope="session")
def info(comfy: Server) -> dict:
    """The definitions of all nodes; new files in ComfyUI's folders are not in it."""
    return comfy.get("/object_info")
