"""Writes the example graphs: each as the interface saves it, and its API twin.

    python -m tools.build_workflows http://127.0.0.1:8188

The address is that of a running ComfyUI with this pack, whose node descriptions give widgets and sockets.
"""

import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from . import embedded_workflows, released_workflows, running_workflows, sampling_workflows, voting_workflows
from .workflow_graph import Graph, Layout, interface_graph

FOLDER = Path(__file__).resolve().parents[1] / "workflows"


def graphs(info: dict) -> Iterator[tuple[str, Graph, Layout]]:
    """Name, nodes and layout of every example."""
    for example in released_workflows.EXAMPLES:
        graph = Graph(info)
        released_workflows.build(example, graph)
        yield example.name, graph, released_workflows.layout(example)
    for module in (embedded_workflows, voting_workflows, running_workflows, sampling_workflows):
        for name, build in module.GRAPHS.items():
            graph = Graph(info)
            build(graph.add)
            yield name, graph, module.LAYOUTS[name]


def files(info: dict) -> dict[str, str]:
    """Path below `workflows` and content of every file.

    Args:
        info: the answer of ComfyUI's /object_info.
    """
    written = {}
    for name, graph, layout in graphs(info):
        for folder, data in (("", interface_graph(graph, layout)), ("api/", graph.nodes)):
            written[f"{folder}{name}.json"] = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    return written


def main(address: str) -> None:
    with urllib.request.urlopen(f"{address}/object_info") as answer:
        info = json.load(answer)
    for path, text in files(info).items():
        (FOLDER / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
