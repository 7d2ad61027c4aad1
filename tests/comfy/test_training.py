"""Training from a graph, against the real server and with real trainer processes; the runs are as short as they can be.

`DANCEGRPO_CANCELS` is how many moments each route of cancelling is tried at.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from comfy_host import ROOT, PromptFailed, Server

CANCELS = int(os.environ.get("DANCEGRPO_CANCELS", "1"))
LONG = 5000
"""Iterations of a run that is never meant to end by itself."""
SHORT = ["rollout.steps=4", "rollout.group_size=2", "rollout.prompts_per_iteration=2", "evaluation.images_per_prompt=1"]
COMPARE = "DanceGRPO_CompareLoRAs"
TRAIN = "DanceGRPO_TrainLoRA"


def graph(name: str, iterations: int = 2, *, wait: bool = True, processes: int = 1, **inputs: object) -> dict:
    """Demo model, a reward, short settings, training."""
    overrides = "\n".join([*SHORT, "runtime.samples_every=1", f"runtime.iterations={iterations}"])
    train = {
        "grpo_model": ["model", 3],
        "clip": ["model", 1],
        "reward": ["reward", 0],
        "settings": ["settings", 0],
        "name": name,
        "prompts": "a red circle\na blue square",
        "held_out_prompts": "a green triangle",
        "wait": wait,
        "processes": processes,
    }
    return {
        "model": node("DanceGRPO_DemoModel"),
        "reward": node("DanceGRPO_LoadReward", reward="colorfulness"),
        "settings": node("DanceGRPO_Preset", preset="demo", overrides=overrides),
        "train": node(TRAIN, **{**train, **inputs}),
    }


def node(class_type: str, **inputs: object) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def look(name: str, action: str = "look") -> dict:
    return {"run": node("DanceGRPO_Run", name=name, action=action)}


def folder(comfy: Server, name: str) -> Path:
    return comfy.base / "output" / "dancegrpo" / "runs" / name


def status(comfy: Server, name: str) -> dict:
    try:
        return json.loads((folder(comfy, name) / "status.json").read_text())
    except FileNotFoundError:
        return {}


def iterations(comfy: Server, name: str) -> list[int]:
    events = folder(comfy, name) / "events.jsonl"
    lines = events.read_text().splitlines() if events.exists() else []
    return [json.loads(line)["iteration"] for line in lines]


def processes_of(comfy: Server, name: str) -> list[psutil.Process]:
    """Every process whose command line names the run, but for those that have ended and wait to be asked after."""
    path, found = str(folder(comfy, name)), []
    for process in psutil.process_iter(["cmdline", "status"]):
        if path in (process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def until(condition: Callable[[], object], patience: float = 300) -> float:
    """Seconds it took to come true."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < patience
        time.sleep(0.05)
    return time.monotonic() - begun


def error_of(server: Server, prompt: dict) -> str:
    """What a user is told; one mistake must be told once."""
    with pytest.raises(PromptFailed) as failed:
        server.run(prompt)
    (fault,) = failed.value.faults
    return fault.text


@pytest.fixture
def uncached(tmp_path: Path) -> Iterator[Server]:
    """A server that caches nothing and is killed in the test."""
    server = Server(tmp_path, "--cache-none").start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    servers = [request.getfixturevalue(name) for name in ("comfy", "uncached") if name in request.fixturenames]
    yield
    folders = [str(server.base / "output" / "dancegrpo") for server in servers]
    for process in psutil.process_iter(["cmdline"]):
        if any(folder in word for word in process.info["cmdline"] or [] for folder in folders):
            process.kill()


# ------------------------------------------------------------------------------------------------- train and compare


def test_a_graph_trains_and_uses_the_lora_and_queueing_it_again_does_not_train(comfy: Server) -> None:
    prompt = workflow("01 Train a LoRA from rewards")
    train, compare = only(prompt, TRAIN), only(prompt, COMPARE)
    outputs = comfy.run(prompt)
    file = comfy.base / "output" / "loras" / "dancegrpo" / "shapes_lora_2.safetensors"
    listed = os.path.join("dancegrpo", file.name)  # noqa: PTH118 - as ComfyUI writes it
    assert "finished" in outputs[train]["text"][0]
    assert iterations(comfy, "shapes_lora") == [1, 2]
    assert len(list(folder(comfy, "shapes_lora").glob("conditions-*.safetensors"))) == 1
    for key in (train, compare):
        assert all(path.stat().st_size > 500 for path in comfy.images(outputs[key]))
    base, learned = figures(outputs[compare])
    assert base != learned

    lora, before = file.read_bytes(), status(comfy, "shapes_lora")
    again = comfy.run(prompt)
    assert "finished" in again[train]["text"][0]
    assert status(comfy, "shapes_lora") == before

    # The file by its name, without the training: the same figures as from the graph that trained it.
    del prompt[compare]["inputs"]["lora_model_1"]
    prompt[compare]["inputs"]["lora_1"] = listed
    needed = ancestors(prompt, compare)
    assert train not in needed
    by_name = comfy.run({key: prompt[key] for key in needed})
    assert figures(by_name[compare]) == [base, learned]
    assert "lora key not loaded" not in comfy.output
    assert [p.name for p in file.parent.glob("shapes_lora_*")] == [file.name]
    assert file.read_bytes() == lora


def figures(output: dict) -> list[dict]:
    """Rewards and looks of every model that Compare LoRAs has scored."""
    (data,) = output["dancegrpo"]
    return [{part: model[part] for part in ("rewards", "looks")} for model in data["models"]]


def workflow(name: str) -> dict:
    """An example in API format, so short that it says nothing of what it shows, but runs all of it."""
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for key, entry in prompt.items():
        inputs = entry["inputs"]
        if entry["class_type"] == "DanceGRPO_Preset":
            inputs["overrides"] = "\n".join([*SHORT, "runtime.iterations=2", "optimizer.learning_rate=0.01"])
        if entry["class_type"] == "DanceGRPO_Settings":
            inputs |= {
                "runtime_iterations": 2,
                "rollout_steps": 4,
                "rollout_group_size": 2,
                "overrides": "evaluation.images_per_prompt=1",
            }
        for box in ("prompts", "held_out_prompts"):
            if isinstance(inputs.get(box), str):
                inputs[box] = "\n".join(inputs[box].splitlines()[:2])
        assert key == str(int(key))
    return prompt


def only(prompt: dict, kind: str) -> str:
    """The one node of a class, or of a class and a title that begins so."""
    class_type, _, title = kind.partition(" ")
    found = [
        key for key, n in prompt.items() if n["class_type"] == class_type and n["_meta"]["title"].startswith(title)
    ]
    assert len(found) == 1, found
    return found[0]


def ancestors(prompt: dict, key: str) -> set[str]:
    """A node and all it needs."""
    links = [value[0] for value in prompt[key]["inputs"].values() if isinstance(value, list)]
    return {key}.union(*(ancestors(prompt, link) for link in links))


def test_the_example_on_two_processes_trains(comfy: Server) -> None:
    prompt = workflow("17 Train on two processes")
    outputs = comfy.run(prompt)
    run = prompt[only(prompt, TRAIN)]["inputs"]["name"]
    assert iterations(comfy, run) == [1, 2]
    assert status(comfy, run)["state"] == "finished"
    assert processes_of(comfy, run) == []
    assert comfy.images(outputs[only(prompt, "SaveImage Reward")])[0].stat().st_size > 500
    assert outputs[only(prompt, "PreviewAny Name")]["text"] == [os.path.join("dancegrpo", f"{run}_2.safetensors")]  # noqa: PTH118


def test_the_example_in_the_background_is_done_before_its_run(comfy: Server) -> None:
    prompt = workflow("16 Train in the background")
    run, shown = prompt[only(prompt, TRAIN)]["inputs"]["name"], only(prompt, "PreviewAny Progress")
    assert comfy.run(prompt)[shown]["text"][0]
    look = prompt[only(prompt, "DanceGRPO_Run")]["inputs"]
    look["action"] = "watch"
    assert "finished" in comfy.run(prompt)[shown]["text"][0]
    assert iterations(comfy, run) == [1, 2]
    assert processes_of(comfy, run) == []


def sampled(model: str, name: str) -> dict:
    """Nodes that sample an image from `model` and preview it as `name`."""
    return {
        f"{name}_text": node("CLIPTextEncode", clip=["model", 1], text="a green triangle"),
        f"{name}_latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        f"{name}_sampled": node(
            "KSampler", model=[model, 0], positive=[f"{name}_text", 0], negative=[f"{name}_text", 0],
            latent_image=[f"{name}_latent", 0], seed=1, steps=4, cfg=1.0, sampler_name="euler", scheduler="simple",
            denoise=1.0,
        ),
        f"{name}_image": node("VAEDecode", samples=[f"{name}_sampled", 0], vae=["model", 2]),
        name: node("PreviewImage", images=[f"{name}_image", 0]),
    }  # fmt: skip


def pixels(path: Path) -> bytes:
    from PIL import Image

    return Image.open(path).tobytes()


def test_other_settings_under_an_old_name_say_what_changed(comfy: Server) -> None:
    comfy.run(graph("one", wait=False))
    comfy.run(look("one", "stop"))
    assert "runtime.iterations was 2 and is now 1" in error_of(comfy, graph("one", 1))
    assert "prompts.texts was" in error_of(comfy, graph("one", prompts="a red circle\na red square"))
    other = graph("one")
    del other["train"]["inputs"]["clip"]
    assert "prompts.conditions was" in error_of(comfy, other)
    assert status(comfy, "one")["state"] == "stopped"


# ---------------------------------------------------------------------------------------------------- background


def test_in_the_background_other_prompts_run_and_the_run_is_watched_stopped_resumed(comfy: Server) -> None:
    started = comfy.run(graph("two", LONG, wait=False))
    assert len(iterations(comfy, "two")) < LONG, "it did not wait for the run"
    assert "two" in started["train"]["text"][0]
    until(lambda: len(iterations(comfy, "two")) >= 2)
    done = len(iterations(comfy, "two"))
    assert comfy.images(comfy.run(
        {"model": node("DanceGRPO_DemoModel")} | sampled("model", "other"))["other"])[0].exists()  # fmt: skip
    until(lambda: len(iterations(comfy, "two")) > done)

    assert comfy.run(graph("two", LONG, wait=False))["train"]["text"][0].count("running") == 1
    assert len(processes_of(comfy, "two")) == 1, "queueing a live run again attaches to it"
    assert "left" in comfy.run(look("two"))["run"]["text"][0]

    assert "stopped" in comfy.run(look("two", "stop"))["run"]["text"][0]
    assert processes_of(comfy, "two") == []
    done = iterations(comfy, "two")
    (conditions,) = folder(comfy, "two").glob("conditions-*.safetensors")
    hidden = conditions.rename(conditions.with_suffix(".hidden"))
    assert f"has lost its file of encoded prompts, {conditions.name}" in error_of(comfy, look("two", "resume"))
    assert processes_of(comfy, "two") == []
    hidden.rename(conditions)
    comfy.run(look("two", "resume"))
    until(lambda: len(iterations(comfy, "two")) > len(done))
    numbers = iterations(comfy, "two")
    assert numbers == list(range(1, len(numbers) + 1))
    comfy.run(look("two", "stop"))


def test_each_action_is_carried_out_every_time_it_is_queued(comfy: Server) -> None:
    """The same graph again, word for word: ComfyUI must not answer from its cache."""
    state = lambda: status(comfy, "pressed")["state"]  # noqa: E731
    comfy.run(graph("pressed", LONG, wait=False))
    for _ in range(2):
        comfy.run(look("pressed", "stop"))
        assert state() == "stopped"
        assert processes_of(comfy, "pressed") == []
        for _ in range(2):
            (data,) = comfy.run(look("pressed"))["run"]["dancegrpo"]
            assert (data["run"], data["state"], data["running"]) == ("pressed", "stopped", False)
        comfy.run(look("pressed", "resume"))
        assert state() in ("starting", "running")
        until(lambda: len(processes_of(comfy, "pressed")) == 1)
    for _ in range(2):  # in the background, GRPO Train LoRA attaches each time
        prompt = comfy.queue(graph("pressed", LONG, wait=False))
        (data,) = comfy.wait(prompt)["outputs"]["train"]["dancegrpo"]
        assert data["running"]
        assert "train" not in comfy.cached_nodes(prompt)
    comfy.run(look("pressed", "stop"))
    for _ in range(2):
        (data,) = comfy.run(look("pressed", "watch"))["run"]["dancegrpo"]
        assert data["state"] == "stopped"


def test_a_run_that_does_not_exist_is_one_sentence(comfy: Server) -> None:
    assert "there is no run named 'nobody'" in error_of(comfy, look("nobody"))
    assert not folder(comfy, "nobody").exists()
    assert "no run is given: connect a run, or enter its name" in error_of(comfy, look(""))


# --------------------------------------------------------------------------------------------------------- cancel


@pytest.mark.parametrize(("processes", "times"), [(1, 2 * CANCELS), (2, CANCELS)])
def test_cancel_leaves_no_process_and_a_run_that_goes_on(comfy: Server, processes: int, times: int) -> None:
    name, chance = f"cancel-{processes}", random.Random(processes)
    for attempt in range(times):
        done = iterations(comfy, name)
        prompt = comfy.queue(graph(name, LONG, processes=processes))
        until(lambda: processes_of(comfy, name))
        if attempt < 2:  # within training for sure; later attempts come at any moment, also during the imports
            until(lambda done=done: len(iterations(comfy, name)) > len(done))
        time.sleep(chance.uniform(0, 12 if attempt > 1 else 1))
        if attempt % 2:
            comfy.post(f"/api/jobs/{prompt}/cancel", {})
        else:
            comfy.post("/interrupt", {})
        assert until(lambda: not processes_of(comfy, name), patience=30) < 10
        messages = comfy.wait(prompt)["status"]["messages"]
        assert messages[-1][0] == "execution_interrupted"
        assert status(comfy, name)["state"] == "stopped"
        numbers = iterations(comfy, name)
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) >= len(done)
        loras = (comfy.base / "output" / "loras" / "dancegrpo").glob(f"{name}_*.safetensors")
        assert list(loras) or not numbers


def test_who_stops_watching_has_no_failed_job_and_the_run_goes_on(comfy: Server) -> None:
    comfy.run(graph("watched", LONG, wait=False))
    until(lambda: len(iterations(comfy, "watched")) >= 1)
    prompt = look("watched", "watch")
    prompt["behind"] = {"class_type": "PreviewAny", "inputs": {"source": ["run", 0]}}
    queued = comfy.queue(prompt)
    time.sleep(3)
    comfy.post("/interrupt", {})
    entry = comfy.wait(queued)
    assert entry["status"]["status_str"] == "success"
    assert entry["outputs"]["run"]["text"][0].endswith("no longer watched; the run goes on")
    assert "behind" not in entry["outputs"], "what waits for the end of the run is not executed"
    assert processes_of(comfy, "watched")
    comfy.run(look("watched", "stop"))


# ------------------------------------------------------------------------------------------------- death and restart


def test_a_dead_process_raises_with_the_end_of_its_log_and_the_run_goes_on(comfy: Server) -> None:
    prompt = comfy.queue(graph("dead", LONG))
    until(lambda: len(iterations(comfy, "dead")) >= 1)
    with (folder(comfy, "dead") / "log.txt").open("a") as log:
        log.write("the last words\n")
    for process in processes_of(comfy, "dead"):
        process.send_signal(signal.SIGKILL)
    messages = comfy.wait(prompt)["status"]["messages"]
    said = next(body["exception_message"] for kind, body in messages if kind == "execution_error")
    assert "'dead' failed: its processes exited unexpectedly; see the log below" in said
    assert "the last words" in said
    done = len(iterations(comfy, "dead"))
    comfy.run(graph("dead", LONG, wait=False))
    until(lambda: len(iterations(comfy, "dead")) > done)
    comfy.run(look("dead", "stop"))


def test_a_killed_server_leaves_the_run_alone_and_the_next_one_attaches(uncached: Server) -> None:
    total = 60
    uncached.queue(graph("three", total))
    until(lambda: len(iterations(uncached, "three")) >= 1)
    uncached.kill()
    pid = status(uncached, "three")["pid"]
    assert psutil.pid_exists(pid)
    uncached.start()
    assert "finished" in uncached.run(graph("three", total))["train"]["text"][0]
    assert iterations(uncached, "three") == list(range(1, total + 1))
    after = status(uncached, "three")
    assert after["pid"] == pid, "another process took part in the training"
    again = uncached.run(graph("three", total))
    assert "finished" in again["train"]["text"][0]
    assert status(uncached, "three") == after
    assert processes_of(uncached, "three") == []


# ---------------------------------------------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def finished(comfy: Server) -> str:
    """The name of a finished run of two iterations."""
    comfy.run(graph("done"))
    return "done"


def test_results_are_data_in_the_history(comfy: Server, finished: str) -> None:
    (data,) = comfy.run(look(finished))["run"]["dancegrpo"]
    run = folder(comfy, finished)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert data == {
        "run": finished,
        "folder": f"dancegrpo/runs/{finished}",
        "running": False,
        "state": "finished",
        "iteration": 2,
        "iterations": 2,
        "error": None,
        "rewards": events[-1]["rewards"],
        "lora_name": os.path.join("dancegrpo", f"{finished}_2.safetensors"),  # noqa: PTH118
        "lora_file": f"loras/dancegrpo/{finished}_2.safetensors",
        "loras": [{"name": data["lora_name"], "file": data["lora_file"]}],
        "summary": json.loads((run / "report" / "summary.json").read_text()),
    }
    assert (comfy.base / "output" / data["lora_file"]).read_bytes() == (run / "lora.safetensors").read_bytes()
    prompt = comfy.queue(look(finished))
    comfy.wait(prompt)
    assert comfy.get(f"/api/jobs/{prompt}")["outputs"]["run"]["dancegrpo"] == [data]


def test_a_finished_run_comes_from_the_cache_until_something_of_it_has_changed(comfy: Server, finished: str) -> None:
    def queue() -> tuple[dict, bool]:
        prompt = comfy.queue(graph(finished))
        (data,) = comfy.wait(prompt)["outputs"]["train"]["dancegrpo"]
        return data, "train" in comfy.cached_nodes(prompt)

    queue()
    data, cached = queue()
    assert cached, "nodes behind it would be computed again and again"
    published = comfy.base / "output" / data["lora_file"]
    content = published.read_bytes()
    published.unlink()
    again, cached = queue()
    assert not cached
    assert (again, published.read_bytes()) == (data, content)
    published.unlink(), (folder(comfy, finished) / "lora.safetensors").unlink()
    again, cached = queue()
    assert not cached
    assert again["state"] == "finished"
    assert again["rewards"] == data["rewards"], "nothing is trained again"
    assert published.read_bytes()


def test_progress_text_is_sent_to_the_client_that_queued(comfy: Server, finished: str) -> None:
    """On another's screen it would appear on whatever node has the same number."""
    mine, other = asyncio.run(_texts(comfy, look(finished), queue_as="mine", listen_as=["mine", "other"]))
    assert [(node_id, text.splitlines()[:2]) for node_id, text in mine] == [
        ("run", [f"run '{finished}': finished", "iteration 2 of 2"])
    ]
    assert other == []
    assert asyncio.run(_texts(comfy, look(finished), queue_as=None, listen_as=["other"])) == [[]]
    mine, other = asyncio.run(_texts(comfy, look("nobody"), queue_as="mine", listen_as=["mine", "other"]))
    assert [text.split(" in ")[0] for _, text in mine] == ["there is no run named 'nobody'"]
    assert other == []


async def _texts(
    comfy: Server, prompt: dict, queue_as: str | None, listen_as: list[str]
) -> list[list[tuple[str, str]]]:
    """Node and text of every progress text, for each listener, until the prompt has ended."""
    import aiohttp

    async with aiohttp.ClientSession() as session, contextlib.AsyncExitStack() as stack:
        address = f"ws://127.0.0.1:{comfy.port}/ws?clientId="
        sockets = [await stack.enter_async_context(session.ws_connect(address + name)) for name in listen_as]
        prompt_id = comfy.queue(prompt, queue_as)
        while prompt_id not in comfy.get(f"/history/{prompt_id}"):
            await asyncio.sleep(0.05)
        return [await _drain(socket) for socket in sockets]


async def _drain(socket: object) -> list[tuple[str, str]]:
    found = []
    with contextlib.suppress(asyncio.TimeoutError):
        while True:
            message = await socket.receive(timeout=0.5)
            if isinstance(message.data, bytes) and int.from_bytes(message.data[:4], "big") == 3:
                length = int.from_bytes(message.data[4:8], "big")
                found.append((message.data[8 : 8 + length].decode(), message.data[8 + length :].decode()))
    return found


# ------------------------------------------------------------------------------------------------------- bad input


def test_a_list_of_prompts_is_used_as_a_whole(comfy: Server) -> None:
    prompt = graph("listed", wait=False, prompts=["lines", 0])
    prompt["lines"] = node("DanceGRPO_PromptLines", prompts="a red circle\na blue square\n\ntwo triangles")
    del prompt["train"]["inputs"]["held_out_prompts"]
    (data,) = comfy.run(prompt)["train"]["dancegrpo"]
    comfy.run(look("listed", "stop"))
    assert data["run"] == "listed"
    description = yaml.safe_load((folder(comfy, "listed") / "run.yaml").read_text())["description"]
    assert description["prompts"]["texts"] == ["a red circle", "a blue square", "two triangles"]
    prompt["train"]["inputs"] |= {"name": "listed twice", "reward": ["rewards", 0]}
    prompt["kinds"] = node("DanceGRPO_PromptLines", prompts="a\nb")
    prompt["rewards"] = node("DanceGRPO_ThresholdReward", reward=["reward", 0], threshold=["numbers", 0])
    prompt["numbers"] = node(
        "DanceGRPO_ScoreImages", reward=["reward", 0], images=["image", 0], prompt="a", batch="images"
    )
    prompt["image"] = node("EmptyImage", width=16, height=16, batch_size=2, color=0)
    assert "reward is connected to a list of 2 values: connect a single value" in error_of(comfy, prompt)
    assert not folder(comfy, "listed twice").exists()


def test_many_prompts_do_not_stop_the_server_from_answering(comfy: Server) -> None:
    """Both refused and accepted: once the whole server stood still for as long as the check took."""
    lines = [f"a red circle number {i}" for i in range(20_000)]
    longest, done = [0.0], threading.Event()

    def ask() -> None:
        while not done.is_set():
            begun = time.monotonic()
            comfy.get("/system_stats")
            longest[0] = max(longest[0], time.monotonic() - begun)
            time.sleep(0.02)

    listener = threading.Thread(target=ask)
    listener.start()
    try:
        repeated = graph("many", prompts="\n".join([*lines, lines[7]]), held_out_prompts="")
        assert error_of(comfy, repeated).startswith("prompts contains 'a red circle number 7' more than once")
        accepted = graph("many", wait=False, prompts="\n".join(lines), held_out_prompts="\n".join(lines[::-1]))
        said = error_of(comfy, accepted)
        assert said.startswith("held_out_prompts: 'a red circle number ")
        assert "is also in prompts" in said
        accepted["train"]["inputs"] |= {"held_out_prompts": "a blue square", "prompts": "\n".join(lines)}
        del accepted["train"]["inputs"]["clip"]
        assert comfy.run(accepted)["train"]["dancegrpo"][0]["run"] == "many"
        comfy.run(look("many", "stop"))
    finally:
        done.set()
        listener.join()
    assert longest[0] < 5, "seconds that a request took; it was 16 on a fast machine"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "C:\\x", "a\x00b", "con", "a/b", ""], ids=repr)
def test_bad_names_are_refused_before_anything_runs(comfy: Server, name: str) -> None:
    before = sorted(comfy.base.rglob("*"))
    with pytest.raises(PromptFailed) as failed:
        comfy.run(graph(name))
    (fault,) = failed.value.faults
    assert (fault.node, fault.input, fault.kind) == ("train", "name", "custom_validation_failed")
    assert fault.text.startswith("name - name ")
    assert sorted(comfy.base.rglob("*")) == before


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"prompts": " \n "}, "prompts is empty"),
        ({"held_out_prompts": "a red circle"}, "is also in prompts"),
        ({"processes": 64}, "64 processes are more than the"),
        ({"gpus": "0;rm"}, "enter numbers separated by commas"),
        # A workflow may hold anything in place of a link: none of it becomes a part of the run.
        ({"grpo_model": {"family": "sd3", "path": str(ROOT)}}, "grpo_model must be connected to a node of this pack"),
        ({"settings": {"evaluation": {"file": str(ROOT / "README.md")}}}, "settings must be connected"),
        ({"reward": {"rewards": [{"name": "shapes"}]}}, "reward must be connected"),
        ({"evaluation_rewards": {"rewards": [{"name": "shapes"}]}}, "evaluation_rewards must be connected"),
    ],
)
def test_other_bad_input_is_one_sentence_and_starts_nothing(comfy: Server, inputs: dict, says: str) -> None:
    assert says in error_of(comfy, graph("bad", **inputs))
    assert not folder(comfy, "bad").exists()


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"prompts": ""}, "prompts is empty: enter one prompt per line"),
        ({"prompts": "a\nb\na"}, "prompts contains 'a' more than once"),
        ({"held_out_prompts": "a blue square"}, "held_out_prompts: 'a blue square' is also in prompts"),
        ({"gpus": "0,0", "processes": 2}, "gpus is '0,0': list 2 different GPUs, one per process"),
        ({"processes": 5}, "5 processes are more than the 4 images of an iteration"),
        ({"settings": {"a": 1}}, "settings must be connected to a node of this pack; it is a dict instead"),
    ],
)
def test_what_is_wrong_without_the_model_is_said_before_the_model_is_made(
    comfy: Server, inputs: dict, says: str
) -> None:
    prompt = graph("bad", clip=["late clip", 0], **inputs)
    prompt["late clip"] = node("CLIPSetLastLayer", clip=["model", 1], stop_at_clip_layer=-3)  # never cached
    with pytest.raises(PromptFailed) as failed:
        comfy.run(prompt)
    (fault,) = failed.value.faults
    assert fault.node == "train"
    assert fault.text.startswith(says)
    (error,) = [body for kind, body in failed.value.details if kind == "execution_error"]
    assert "late clip" not in error["executed"]
    assert not folder(comfy, "bad").exists()


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "missing.safetensors"])
def test_training_starts_from_a_lora_of_comfyuis_lists_only(comfy: Server, name: str) -> None:
    with pytest.raises(PromptFailed) as failed:
        comfy.run(graph("bad", start_from=name))
    (fault,) = failed.value.faults
    assert (fault.node, fault.input, fault.kind) == ("train", "start_from", "value_not_in_list")
    assert not folder(comfy, "bad").exists()
