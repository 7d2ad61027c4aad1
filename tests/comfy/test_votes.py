"""Voting in a real ComfyUI: the node that collects, the routes, the reward that learns, and hostile requests."""

import concurrent.futures
import http.client
import io
import json
import struct
import urllib.parse
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from comfy_host import PromptFailed, Server
from PIL import Image

BAD_NAMES = ["..", "../fox", "/etc", "a/b", "a\\b", "C:x", "nul", "a\x00b", "a\nb", "a\u202eb", "a.", " a", "x" * 65]


class Client:
    """A browser or a script that talks to the routes of one collection."""

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name

    def ask(
        self, method: str, path: str, body: object = None, raw: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        sent = {"Content-Type": "application/json"} if method == "POST" else {}
        sent |= {key.replace("_", "-"): value for key, value in headers.items()}
        content = raw if raw is not None else json.dumps(body or {}).encode() if method == "POST" else None
        address = f"/dancegrpo/votes/{urllib.parse.quote(self.name, safe='')}{path}"
        try:
            connection.request(method, address, content, {k: v for k, v in sent.items() if v})
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: object = None, status: int = 200, **headers: str) -> dict:
        found, received, content = self.ask(method, path, body, **headers)
        assert found == status, content
        assert received["Content-Type"].startswith("application/json")
        return json.loads(content)

    def get(self, path: str = "") -> dict:
        return self.json("GET", path)

    def post(self, path: str, **body: object) -> dict:
        return self.json("POST", path, body)

    def error(self, method: str, path: str, body: object = None, status: int = 400, **headers: str) -> str:
        return self.json(method, path, body, status, **headers)["error"]

    def next(self, query: str = "") -> tuple[str, str]:
        (pair,) = self.get(f"/next?{query}")["pairs"]
        return pair["left"]["image"], pair["right"]["image"]


def folder(server: Server, name: str) -> Path:
    return server.base / "output" / "dancegrpo" / "votes" / name


def write(where: Path, count: int, first: int = 0) -> Path:
    """Images of which number 0 is the darkest."""
    where.mkdir(parents=True)
    for number in range(first, first + count):
        noise = np.random.default_rng(number).integers(0, 20, (32, 32, 3))
        Image.fromarray((noise + 6 * number).astype(np.uint8)).save(where / f"{number:03}.png")
    return where


@pytest.fixture(scope="module")
def light(comfy: Server) -> Client:
    """A collection of thirty images, without votes; `brightness` knows how bright each is."""
    write(comfy.base / "input" / "light pictures", 30)
    client = Client(comfy, "light")
    assert client.post("/create") == {"name": "light"}
    found = client.post("/import", **{"from": "input", "folder": "light pictures", "prompt": "a grey square"})
    assert (found["new"], found["complaints"]) == (30, [])
    return client


def brightness(client: Client, image: str) -> float:
    with Image.open(folder(client.server, client.name) / "images" / image) as picture:
        return float(np.asarray(picture).mean())


def cast(client: Client, left: str, right: str, id: str) -> dict:
    """Vote for the brighter image."""
    brighter = brightness(client, left) > brightness(client, right)
    return client.post("/vote", id=id, left=left, right=right, choice="left" if brighter else "right")


# -------------------------------------------------------------------------------------------------------------- voting


def test_a_headless_client_votes_and_trains_a_judge(light: Client, comfy: Server) -> None:
    state = light.get()
    assert (state["images"], state["prompts"], state["agreement"], state["warnings"]) == (30, 1, None, [])
    assert state["enough"].startswith("too few votes to tell: 0 with a winner")
    seen = set()
    for number in range(24):
        left, right = light.next(f"mode={'random' if number % 3 == 0 else 'active'}")
        assert frozenset((left, right)) not in seen
        seen.add(frozenset((left, right)))
        assert cast(light, left, right, f"vote-{number}")["counted"]
    assert cast(light, left, right, "vote-23") == {"counted": False, "votes": {"winners": 24, "ties": 0, "skips": 0}}
    assert light.post("/vote", id="tie", left=left, right=right, choice="tie")["votes"]["ties"] == 1
    assert light.post("/vote", id="skip", left=left, right=right, choice="skip")["votes"]["skips"] == 1
    assert light.post("/undo", id="undo-1", vote="tie")["undone"] == "tie"
    assert light.post("/undo", id="undo-2")["undone"] == "skip"
    assert light.post("/undo", id="undo-2") == {"undone": "skip", "votes": {"winners": 24, "ties": 0, "skips": 0}}
    state = light.get()
    assert state["agreement"]["tested"] == 24
    assert 0.7 < state["agreement"]["share"] <= 1
    assert state["agreement"]["low"] < state["agreement"]["share"]
    listed = {one["name"]: one for one in json.loads(comfy.fetch("/dancegrpo/votes"))["collections"]}
    assert listed["light"] == {"name": "light", "images": 30, "votes": {"winners": 24, "ties": 0, "skips": 0}}
    scores = scored(comfy, "light")
    assert scores == sorted(scores)


def scored(server: Server, collection: str) -> list[float]:
    """What `preference` gives three grey images, the darkest first."""
    prompt = {
        str(i): {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 32, "batch_size": 1, "color": color}}
        for i, color in enumerate((0x101010, 0x606060, 0xB0B0B0))
    }
    prompt["a"] = {"class_type": "ImageBatch", "inputs": {"image1": ["0", 0], "image2": ["1", 0]}}
    prompt["b"] = {"class_type": "ImageBatch", "inputs": {"image1": ["a", 0], "image2": ["2", 0]}}
    options = {"reward": "preference", "reward.collection": collection, "reward.backbone": "pixels"}
    prompt["reward"] = {"class_type": "DanceGRPO_LoadReward", "inputs": {**options, "reward.dtype": "float32"}}
    inputs = {"reward": ["reward", 0], "images": ["b", 0], "prompt": "a grey square", "batch": "images"}
    prompt["score"] = {"class_type": "DanceGRPO_ScoreImages", "inputs": inputs}
    lines = server.run(prompt)["score"]["text"][0].splitlines()[:3]
    return [float(line.split()[1]) for line in lines]


def test_new_votes_change_scores_and_old_ones_are_reused(light: Client, comfy: Server) -> None:
    before = scored(comfy, "light")
    assert scored(comfy, "light") == before
    left, right = light.next()
    assert brightness(light, left) != brightness(light, right)
    darker = "right" if brightness(light, left) > brightness(light, right) else "left"
    for number in range(5):
        light.post("/vote", id=f"change-of-mind-{number}", left=left, right=right, choice=darker)
    assert scored(comfy, "light") != before


def test_images_are_served_with_a_fixed_type(light: Client) -> None:
    image = light.next()[0]
    status, headers, full = light.ask("GET", f"/images/{image}")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert full == (folder(light.server, "light") / "images" / image).read_bytes()
    status, headers, small = light.ask("GET", f"/images/{image}?size=thumb")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert max(Image.open(io.BytesIO(small)).size) <= 320


def test_pairs_ahead_leave_out_what_is_on_the_screen(light: Client) -> None:
    pairs = light.get("/next?count=3")["pairs"]
    assert len(pairs) == 3
    assert pairs[0]["left"]["prompt"] == "a grey square"
    first = [pairs[0][side]["image"] for side in ("left", "right")]
    others = light.get(f"/next?count=20&exclude={first[0]}:{first[1]}")["pairs"]
    assert set(first) not in [{pair["left"]["image"], pair["right"]["image"]} for pair in others]


def test_favourites_are_imported_and_everything_is_exported(comfy: Server) -> None:
    for side, first in (("liked", 30), ("others", 5)):
        write(comfy.base / "output" / "sorted" / side, 4, first)
    client = Client(comfy, "favourites")
    client.post("/create")
    found = client.post("/import", **{"from": "output", "better": "sorted/liked", "worse": "sorted/others"})
    assert (found["new"], found["votes"]) == (8, 16)
    assert client.get()["agreement"]["share"] == 1
    place = client.post("/export")
    content = comfy.fetch("/view?" + urllib.parse.urlencode(place))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.read("votes.csv").count(b"\n") == 17
        assert len([name for name in archive.namelist() if name.startswith("images/")]) == 8


def test_a_deleted_collection_can_be_brought_back(comfy: Server) -> None:
    client = Client(comfy, "passing")
    client.post("/create")
    client.post("/delete")
    assert "there is no collection named 'passing'" in client.error("GET", "")
    assert client.post("/restore") == {"name": "passing"}
    assert client.get()["images"] == 0


# -------------------------------------------------------------------------------------------------------- several, kill


def test_two_clients_at_once_lose_nothing_and_count_nothing_twice(light: Client, comfy: Server) -> None:
    client = Client(comfy, "together")
    client.post("/create")
    client.post("/import", **{"from": "input", "folder": "light pictures"})

    def vote(voter: int) -> list[str]:
        ids = []
        for number in range(12):
            left, right = client.next("mode=random")
            ids.append(f"{voter}-{number}")
            for _ in range(2):  # as if the first answer had been lost
                cast(client, left, right, ids[-1])
        client.post("/undo", id=f"undo-{voter}", vote=ids.pop())
        return ids

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        expected = sorted(id for ids in pool.map(vote, range(2)) for id in ids)
    rows = (folder(comfy, "together") / "votes.csv").read_text().splitlines()
    assert len(rows) == 1 + 24 + 2
    assert client.get()["votes"]["winners"] == len(expected) == 22
    assert client.get()["warnings"] == []


def test_a_server_killed_between_votes_has_what_it_answered(light: Client, comfy: Server) -> None:
    client = Client(comfy, "killed")
    client.post("/create")
    client.post("/import", **{"from": "input", "folder": "light pictures"})
    for number in range(3):
        left, right = client.next()
        cast(client, left, right, f"before-{number}")
    comfy.kill()
    with (folder(comfy, "killed") / "votes.csv").open("a") as file:
        file.write(f"{left},{right},,,")  # a row cut short
    comfy.start()
    assert client.get()["votes"]["winners"] == 3
    assert "votes.csv, line 5 is left out: it has 5 columns" in client.get()["warnings"][0]
    assert cast(client, left, right, "before-2")["counted"] is False
    left, right = client.next()
    assert cast(client, left, right, "after")["votes"]["winners"] == 4


# -------------------------------------------------------------------------------------------------------- hostile input


def test_posts_from_other_origins_are_refused(light: Client, comfy: Server) -> None:
    host = f"127.0.0.1:{comfy.port}"
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": f"http://{host}.evil.example"},
        {"Origin": f"http://{host}", "Sec-Fetch-Site": "cross-site"},
    ):
        assert light.ask("POST", "/delete", **headers)[0] == 403
    for headers in ({"Origin": "null"}, {"Origin": f"http://{host}", "Sec-Fetch-Site": "same-site"}):
        assert "another origin" in light.error("POST", "/delete", status=403, **headers)
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert "content type" in light.error("POST", "/delete", status=415, Content_Type=kind)
    assert light.get()["images"] == 30
    for headers in ({"Origin": f"http://{host}"}, {"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}):
        assert light.json("POST", "/create", {}, **headers) == {"name": "light"}


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_names_that_lead_elsewhere_are_refused_everywhere(light: Client, comfy: Server, name: str) -> None:
    before = sorted(path for path in comfy.base.rglob("*") if "votes" in path.parts)
    client = Client(comfy, name)
    if name != "..":  # a client would take that out of the address before it is sent
        assert "cannot be used" in client.error("GET", "") or "too long" in client.error("GET", "")
        for act in ("create", "delete", "restore", "vote", "export", "undo"):
            body = {"id": "1", "left": "a.png", "right": "b.png", "choice": "left"}
            assert "collection" in client.error("POST", f"/{act}", body)
    for body in ({"from": "input", "folder": name}, {"from": "output", "better": name, "worse": name}):
        assert "folder" in light.error("POST", "/import", body)
    assert "is not the name of an image file" in light.error("GET", f"/images/{urllib.parse.quote(name, safe='')}") or (
        name == ".."
    )
    assert "not in the collection" in light.error(
        "POST", "/vote", {"id": "1", "left": name, "right": light.next()[0], "choice": "left"}
    )
    with pytest.raises(PromptFailed) as caught:
        collect(comfy, name)
    assert "cannot be used" in str(caught.value) or "too long" in str(caught.value)
    with pytest.raises(PromptFailed):
        scored(comfy, name)
    assert sorted(path for path in comfy.base.rglob("*") if "votes" in path.parts) == before


def test_bodies_that_are_no_votes_are_one_sentence(light: Client) -> None:
    left, right = light.next()
    vote = {"id": "x", "left": left, "right": right, "choice": "left"}
    for change, words in (
        ({"id": None}, "id is missing"),
        ({"id": 7}, "id must be text"),
        ({"id": "a b"}, "id 'a b' cannot be used"),
        ({"choice": "both"}, "choice is 'both': choose one of left, right, tie, skip"),
        ({"left": ["a"]}, "left must be text"),
        ({"left": right}, "two different images"),
        ({"id": "vote-0", "choice": "tie"}, "id 'vote-0' belongs to another vote"),
    ):
        assert words in light.error("POST", "/vote", vote | change)
    for raw, words in ((b"[" * 100_000, "not JSON"), (b"[1]", "JSON object"), (b"\xff", "not JSON")):
        status, _, content = light.ask("POST", "/vote", raw=raw)
        assert status == 400
        assert words in json.loads(content)["error"]
    assert light.ask("POST", "/vote", raw=b" " * (1 << 20) + b"{}")[0] == 413
    assert "no vote of the id 'nothing'" in light.error("POST", "/undo", {"id": "u", "vote": "nothing"})
    assert "whole number from 1 to 20" in light.error("GET", "/next?count=1000")
    assert "backbone is '../x'" in light.error("GET", "/next?backbone=../x")
    assert "exclude must be pairs" in light.error("GET", "/next?exclude=a.png")
    assert "no folder 'nothing'" in light.error("POST", "/import", {"from": "input", "folder": "nothing"})
    assert "from is '/etc'" in light.error("POST", "/import", {"from": "/etc", "folder": "x"})
    assert light.ask("GET", "/vote")[0] in (404, 405), "reading changes nothing"


def huge_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def test_links_huge_images_and_pages_among_pictures_are_left_out(light: Client, comfy: Server) -> None:
    secret = comfy.base / "secret"
    write(secret, 2, 40)
    mixed = write(comfy.base / "input" / "mixed", 1, 20)
    (mixed / "link.png").symlink_to(secret / "040.png")
    (mixed / "huge.png").write_bytes(huge_png(10_000, 10_000))
    (mixed / "page.png").write_text("<script>alert(1)</script>")
    (mixed / "020.txt").write_text("<img src=x onerror=alert(1)> \u202e")
    (comfy.base / "input" / "outside").symlink_to(secret, target_is_directory=True)
    client = Client(comfy, "mixed")
    client.post("/create")
    found = client.post("/import", **{"from": "input", "folder": "mixed"})
    assert found["new"] == 1
    assert "huge.png is left out: huge.png has 10000 x 10000 pixels" in found["complaints"][0]
    assert "page.png is not a PNG, JPEG or WebP image" in found["complaints"][1]
    assert "leads out of input" in client.error("POST", "/import", {"from": "input", "folder": "outside"})
    client.post("/import", **{"from": "input", "folder": "light pictures"})
    prompts = {
        side["prompt"] for pair in client.get("/next?count=20&mode=random&repeat=1")["pairs"] for side in pair.values()
    }
    assert prompts <= {"", "<img src=x onerror=alert(1)> \u202e"}
    images = folder(comfy, "mixed") / "images"
    (images / "link.png").symlink_to(secret / "041.png")
    assert "'link.png' is not in the collection" in client.error("GET", "/images/link.png")
    (images / "huge.png").write_bytes(huge_png(10_000, 10_000))
    assert "10000 x 10000 pixels" in client.error("GET", "/images/huge.png?size=thumb")
    assert any("huge.png is left out" in warning for warning in client.get()["warnings"])
    (comfy.base / "output" / "dancegrpo" / "votes" / "linked").symlink_to(secret, target_is_directory=True)
    assert "there is no collection named 'linked'" in Client(comfy, "linked").error("GET", "")


# ---------------------------------------------------------------------------------------------------------------- nodes


def collect(server: Server, name: str, prompts: str = "a red fox", colors: tuple[int, ...] = (0xFF0000, 0xFF)) -> dict:
    prompt = {
        str(i): {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 8, "batch_size": 1, "color": color}}
        for i, color in enumerate(colors)
    }
    prompt["both"] = {"class_type": "ImageBatch", "inputs": {"image1": ["0", 0], "image2": ["1", 0]}}
    inputs = {"images": ["both", 0], "name": name, "prompts": prompts}
    prompt["collect"] = {"class_type": "DanceGRPO_CollectForVoting", "inputs": inputs}
    prompt["shown"] = {"class_type": "PreviewImage", "inputs": {"images": ["collect", 0]}}
    prompt["name"] = {"class_type": "PreviewAny", "inputs": {"source": ["collect", 1]}}
    return server.run(prompt)


def test_the_node_collects_and_passes_images_on(comfy: Server) -> None:
    outputs = collect(comfy, "from a graph")
    assert outputs["collect"]["text"] == ["2 images added to 'from a graph'; it has 2"]
    assert outputs["name"]["text"] == ["from a graph"]
    shown = [np.asarray(Image.open(path)) for path in comfy.images(outputs["shown"])]
    assert [image[0, 0].tolist() for image in shown] == [[255, 0, 0], [0, 0, 255]]
    client = Client(comfy, "from a graph")
    assert client.get()["images"] == 2
    (pair,) = client.get("/next")["pairs"]
    assert {pair[side]["prompt"] for side in pair} == {"a red fox"}
    outputs = collect(comfy, "from a graph", prompts="a red fox\na blue fox", colors=(0xFF0000, 0xFF00))
    assert outputs["collect"]["text"] == ["1 images added to 'from a graph', 1 were there already; it has 3"]
    assert client.get()["prompts"] == 2


def test_prompts_that_do_not_match_and_a_missing_collection_are_one_sentence(comfy: Server) -> None:
    with pytest.raises(PromptFailed, match="prompt has 3 lines for 2 images"):
        collect(comfy, "counted", prompts="a\nb\nc")
    with pytest.raises(PromptFailed, match="there is no collection named 'nothing like it'; there are: "):
        scored(comfy, "nothing like it")
    with pytest.raises(PromptFailed, match="'from a graph' holds 0 votes with a winner; at least 2 are needed"):
        scored(comfy, "from a graph")


def test_load_reward_lists_collections(comfy: Server, light: Client) -> None:
    info = json.loads(comfy.fetch("/object_info/DanceGRPO_LoadReward"))["DanceGRPO_LoadReward"]
    choices = {c["key"]: c["inputs"] for c in info["input"]["required"]["reward"][1]["options"]}["preference"]
    assert "light" in choices["required"]["collection"][1]["options"]
    assert choices["required"]["backbone"][1]["options"][0] == "pixels"
    assert choices["optional"]["collection_name"][0] == "STRING"
