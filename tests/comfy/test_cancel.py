"""Cancel ends the waiting for a scoring server at once, whatever that server does."""

import itertools
import time
from collections.abc import Callable

import pytest
from comfy_host import Server
from stub_server import drip, speaking

MOST = 20.0
"""Seconds that are far from the server's 600, on any machine; it looks ten times in one."""
HOSTILE: dict[str, Callable] = {
    "silence": lambda: drip(iter([b""]), 60.0),
    "100 Continue without end": lambda: drip(itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"), 0.01),
    "headers in drops": lambda: drip(itertools.chain([b"HTTP/1.1 200 OK\r\n"], itertools.repeat(b"A: b\r\n")), 0.01),
}
REWARDS = {
    "external": {"reward.timeout": 600.0, "reward.retries": 3},
    "mllm-yes": {"reward.model": "judge", "reward.timeout": 600.0},
    "mllm-rubric": {"reward.model": "judge", "reward.timeout": 600.0},
}


def scoring(reward: str, url: str) -> dict:
    image = {"width": 16, "height": 16, "batch_size": 2, "color": 0x808080}
    options = {"reward": reward, "reward.url": url} | REWARDS[reward]
    score = {"reward": ["reward", 0], "images": ["image", 0], "prompt": "a fox", "batch": "images"}
    return {
        "image": {"class_type": "EmptyImage", "inputs": image},
        "reward": {"class_type": "DanceGRPO_LoadReward", "inputs": options},
        "score": {"class_type": "DanceGRPO_ScoreImages", "inputs": score},
    }


def with_defaults(prompt: dict, info: dict) -> dict:
    """Every option of the chosen reward, as the interface sends them."""
    inputs = prompt["reward"]["inputs"]
    choices = info["DanceGRPO_LoadReward"]["input"]["required"]["reward"][1]["options"]
    (parts,) = [choice["inputs"] for choice in choices if choice["key"] == inputs["reward"]]
    for section in parts.values():
        for name, entry in section.items():
            inputs.setdefault(f"reward.{name}", entry[1].get("default", ""))
    return prompt


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("case", HOSTILE)
def test_cancel_ends_the_waiting_for_a_hostile_server(comfy: Server, info: dict, case: str, reward: str) -> None:
    reached: list[float] = []
    answer = HOSTILE[case]()

    def talk(line: object) -> None:
        reached.append(time.monotonic())
        answer(line)

    with speaking(talk) as url:
        prompt_id = comfy.queue(with_defaults(scoring(reward, url), info))
        end = time.monotonic() + 60
        while not reached and time.monotonic() < end:
            time.sleep(0.05)
        assert reached, comfy.output[-2000:]
        time.sleep(0.3)
        assert comfy.get(f"/history/{prompt_id}") == {}, "it waits"
        started = time.monotonic()
        comfy.post("/interrupt", {})
        entry = comfy.wait(prompt_id, 60)
        taken = time.monotonic() - started
    kinds = [kind for kind, _ in entry["status"]["messages"]]
    assert "execution_interrupted" in kinds, entry["status"]["messages"]
    print(f"{case}, {reward}: {taken:.2f} s")
    assert taken < MOST
    comfy.get("/system_stats")
