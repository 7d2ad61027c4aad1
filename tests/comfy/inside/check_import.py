"""How long ComfyUI's start waits for the pack, in seconds of the processor: a busy machine does not change them."""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import asyncio, sys, time
import conftest
import comfy.hooks, comfy.lora_convert, comfy.sample, comfy.samplers, comfy.sd, comfy_execution.graph, server
import nodes
begun = time.process_time()
found = asyncio.run(asyncio.run(sys.modules[conftest.NAME].comfy_entrypoint()).get_node_list())
for node in found:
    node.GET_SCHEMA()
print(len(found), time.process_time() - begun)
"""


def test_it_is_imported_in_less_than_half_a_second(tmp_path: Path) -> None:
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, seconds = done.stdout.split()[-2:]
    assert int(count) >= 15
    assert float(seconds) < 0.5
