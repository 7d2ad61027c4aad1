"""A graph in API format, and the same graph as the interface saves it: columns of nodes, a note, titled groups."""

from collections.abc import Callable
from dataclasses import dataclass

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
TITLE, SLOT, WIDGET, TEXT_BOX, LINKED_BOX, GAP = 30, 22, 28, 150, 60, 50
RESULTS = {
    "DanceGRPO_TrainLoRA": 300,
    "DanceGRPO_ScoreImages": 300,
    "DanceGRPO_CompareLoRAs": 460,
    "PreviewAny": 110,
    "LoadImage": 260,
    "SaveImage": 300,
    "SaveVideo": 300,
}
"""Height in pixels of what a node shows after it has run."""


Add = Callable[..., str]
"""`Graph.add`: column, class, title and inputs of a node; gives its number."""


@dataclass(frozen=True)
class Layout:
    """How the interface shows a graph.

    Attributes:
        note: what the note at the top left says.
        widths: of the columns, in pixels; the first is the note's.
        groups: title, first and last column.
        note_height: in pixels.
    """

    note: str
    widths: tuple[int, ...]
    groups: tuple[tuple[str, int, int], ...]
    note_height: int = 680


class Graph:
    """Nodes in API format by number, and the column of each."""

    def __init__(self, info: dict) -> None:
        self.info, self.nodes, self.columns = info, {}, {}

    def add(self, column: int, class_type: str, title: str = "", **inputs: object) -> str:
        """Add a node and return its number; widgets that are not given have their defaults."""
        key = str(len(self.nodes) + 1)
        node = {"class_type": class_type, "inputs": inputs}
        for name, kind, options in widgets(self.info[class_type], inputs):
            if name not in inputs:
                inputs[name] = default(kind, options)
        node["_meta"] = {"title": title or self.info[class_type]["display_name"]}
        self.nodes[key], self.columns[key] = node, column
        return key


def widgets(description: dict, values: dict) -> list[tuple[str, object, dict]]:
    """Name, type and options of a node's widgets, in the interface's order; a choice's own follow it."""
    return _widgets(description["input"], description["input_order"], values, "")


def _widgets(inputs: dict, order: dict | None, values: dict, prefix: str) -> list[tuple[str, object, dict]]:
    found = []
    for section in ("required", "optional"):
        entries = inputs.get(section, {})
        for name in (order or {}).get(section, entries):
            kind, *rest = entries[name]
            options = rest[0] if rest else {}
            if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
                continue
            found.append((prefix + name, kind, options))
            if kind == "COMFY_DYNAMICCOMBO_V3":
                chosen = values.get(name, options["options"][0]["key"])
                (option,) = [option for option in options["options"] if option["key"] == chosen]
                found += _widgets(option["inputs"], None, values, f"{prefix}{name}.")
    return found


def default(kind: object, options: dict) -> object:
    if "default" in options:
        return options["default"]
    if kind == "COMFY_DYNAMICCOMBO_V3":
        return options["options"][0]["key"]
    choices = kind if isinstance(kind, list) else options.get("options")
    return choices[0] if choices else {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(kind, "")


# --------------------------------------------------------------------------------------------- the interface's graph


def interface_graph(graph: Graph, layout: Layout) -> dict:
    """The graph as the interface saves it: the note at the top left, and a titled group around each part."""
    widths, gap = layout.widths, 60
    left = [sum(widths[:i]) + i * gap for i in range(len(widths))]
    nodes, links, feet = placed(graph, left, widths)
    groups = []
    for number, (title, first, last) in enumerate(layout.groups, 1):
        foot = max(feet[first : last + 1])
        box = [left[first] - 20, -90, left[last] + widths[last] - left[first] + 40, foot + 60]
        groups.append({"id": number, "title": title, "bounding": box, "color": "#3f789e", "font_size": 24, "flags": {}})
    note = note_node(len(nodes) + 1, [0, 0], [widths[0], layout.note_height], layout.note)
    return document([*nodes, note], links, groups)


def placed(graph: Graph, left: list[int], widths: tuple[int, ...]) -> tuple[list, list, list[int]]:
    """Nodes and links as the interface saves them, with each column's nodes stacked; and the bottom of each column.

    Args:
        left, widths: of the columns.
    """
    links, nodes, feet = [], [], [0] * len(widths)
    outgoing: dict[tuple[str, int], list[int]] = {}
    for key, node in graph.nodes.items():
        description, column = graph.info[node["class_type"]], graph.columns[key]
        slots, shown = _slots(description, node["inputs"]), widgets(description, node["inputs"])
        for index, slot in enumerate(slots):
            source = node["inputs"].get(slot["name"])
            if isinstance(source, list):
                slot["link"] = len(links) + 1
                links.append([slot["link"], int(source[0]), source[1], int(key), index, slot["type"]])
                outgoing.setdefault((source[0], source[1]), []).append(slot["link"])
        size = [widths[column], _height(description, slots, shown)]
        nodes.append(
            {
                "id": int(key),
                "type": node["class_type"],
                "pos": [left[column], feet[column]],
                "size": size,
                "flags": {},
                "order": int(key) - 1,
                "mode": 0,
                "inputs": slots,
                "outputs": [],
                "properties": {
                    "Node name for S&R": node["class_type"],
                    "cnr_id": "dancegrpo" if node["class_type"].startswith("DanceGRPO") else "comfy-core",
                },
                "widgets_values": _values(shown, node["inputs"]),
                **({"title": node["_meta"]["title"]} if node["_meta"]["title"] != description["display_name"] else {}),
            }
        )
        feet[column] += size[1] + TITLE + GAP
    for node, (key, api) in zip(nodes, graph.nodes.items(), strict=True):
        description = graph.info[api["class_type"]]
        names = zip(description["output_name"], description["output"], strict=True)
        node["outputs"] = [
            {"name": name, "type": kind, "links": outgoing.get((key, slot)), "slot_index": slot}
            for slot, (name, kind) in enumerate(names)
        ]
    # A link's type is that of where it comes from.
    sources = {(node["id"], slot): output["type"] for node in nodes for slot, output in enumerate(node["outputs"])}
    links = [[*link[:5], sources[link[1], link[2]]] for link in links]
    return nodes, links, feet


def document(nodes: list, links: list, groups: list) -> dict:
    """The file that the interface saves, and what it shows of the graph at first."""
    return {
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {"ds": {"scale": 0.75, "offset": [110, 190]}},
        "version": 0.4,
    }


def _slots(description: dict, values: dict) -> list[dict]:
    """Sockets, and widgets that a link fills, in the order of the description."""
    found = []
    for section in ("required", "optional"):
        for name in description["input_order"].get(section, []):
            kind, *rest = description["input"][section][name]
            is_widget = (isinstance(kind, list) or kind in WIDGETS) and not (rest and rest[0].get("forceInput"))
            if not is_widget:
                found.append({"name": name, "type": kind, "link": None})
            elif isinstance(values.get(name), list):
                found.append({"name": name, "type": kind, "link": None, "widget": {"name": name}})
    return found


def _values(shown: list[tuple[str, object, dict]], inputs: dict) -> list:
    values = []
    for name, kind, options in shown:
        value = inputs[name]
        values.append(default(kind, options) if isinstance(value, list) else value)
        if control := options.get("control_after_generate"):
            values.append(control if isinstance(control, str) else "fixed")
        if options.get("image_upload") or options.get("video_upload"):
            values.append("image")
    return values


def _height(description: dict, slots: list[dict], shown: list[tuple[str, object, dict]]) -> int:
    """Enough for sockets, widgets, boxes of text, and what the node shows when it has run."""
    sockets = max(sum("widget" not in slot for slot in slots), len(description["output"]))
    visible = [options for _, _, options in shown if not options.get("advanced")]
    boxes = [name for name, _, options in shown if options.get("multiline") and not options.get("advanced")]
    linked = [slot["name"] for slot in slots if slot["name"] in boxes]
    controls = sum(bool(options.get("control_after_generate")) for options in visible)
    extra = RESULTS.get(description["name"], 0)
    texts = TEXT_BOX * (len(boxes) - len(linked)) + LINKED_BOX * len(linked)
    return 50 + SLOT * sockets + WIDGET * (len(visible) - len(boxes) + controls) + texts + extra


def note_node(number: int, pos: list[int], size: list[int], text: str) -> dict:
    """A note as the interface saves it."""
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": pos,
        "size": size,
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "Read me",
        "properties": {},
        "widgets_values": [text],
    }
