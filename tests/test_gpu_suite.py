"""benchmarks/gpu.py: all of it with tiny networks on a CPU, and what a GPU has to show, where there is one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from comfy_host import COMFYUI, absence

from benchmarks import gpu
from benchmarks.gpu_suite.cases import cases

ROOT = Path(__file__).resolve().parents[1]
FLOAT32 = 1e-3
"""Largest part of the spread of predictions by which rounding in float32 may move one."""
BFLOAT16 = 0.1


def suite(*words: object, timeout: float) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--comfyui", COMFYUI, *words]
    return subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, timeout=timeout, cwd=ROOT
    )


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[object, str]]:
    """Exit code and output of the script where it runs no case, in this process."""

    def run(*words: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, words)])
        code = 0
        try:
            gpu.main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out

    return run


def check(line: dict) -> None:
    """What holds of every case that ended."""
    assert "error" not in line, line
    if line["case"].endswith("one by one"):
        assert line["gradient_cosine"] > 0.999
        assert abs(line["gradient_norm_ratio"] - 1) < 0.01
        assert line["one_by_one_forwards_per_image"] > line["forwards_per_image"]
        return
    assert 0 < line["grad_norm"] < float("inf")
    assert line["lora_tensors"] % 3 == 0
    assert line["ratio_deviation"] < (1e-5 if line["case"].startswith("tiny/") else 1e-2)
    if "resume_exact" in line:
        assert line["lora_off"] < (FLOAT32 if line["case"].startswith("tiny/") else BFLOAT16)
        assert line["lora_does"] > 2 * line["lora_off"], "the LoRA does nothing that could be seen"


@pytest.mark.skipif(absence() is not None, reason=str(absence()))
def test_every_case_runs_on_a_cpu_with_tiny_networks(tmp_path: Path, script: Callable) -> None:
    done = suite("--dry", "--results", tmp_path / "lines.jsonl", timeout=2400)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["case"] for line in lines] == script("--list")[1].splitlines(), done.stderr[-4000:]
    for line in lines:
        if "skipped" not in line:
            check(line)
            assert line.get("resume_exact", True), line
    assert done.returncode == 0
    left_out = {line["skipped"] for line in lines if "skipped" in line}
    known = ("bitsandbytes is not installed", "diffusers quantizes on a GPU", "nothing to compile with: no ")
    assert all(reason.startswith(known) for reason in left_out), left_out
    again = script("--dry", "--results", tmp_path / "lines.jsonl")
    assert again == (0, ""), "what has a line is not run again"
    _, report = script("--report", "--results", tmp_path / "lines.jsonl")
    assert report.startswith("### CPU, ")


def test_a_report_puts_measured_beside_computed(tmp_path: Path, script: Callable) -> None:
    line = {
        "case": "flux.1/bf16",
        "device": "Card",
        "date": "2026-01-02",
        "torch": "2",
        "seconds": {"load": 10.0, "rollout": 4.0, "decode": 1.0, "reward": 0.5, "update": 8.0, "total": 13.5},
        "gib": {"rollout": 24.0, "update": 25.0, "decode": 3.0},
        "computed_gib": {"rollout": 24.0, "update": 20.0},
        "ratio_deviation": 1e-6,
        "resume_exact": False,
        "resume_off": 1e-9,
        "lora_off": 0.01,
    }
    lines = [line, {"case": "z-image/bf16", "device": "Card", "date": "2026-01-02", "torch": "2", "error": "OOM"}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, report = script("--report", "--results", tmp_path / "lines.jsonl")
    assert "### Card, 2026-01-02, PyTorch 2" in report
    assert "| 24.0 (24.0, +0%) | 25.0 (20.0, -20%) | 3.0 | 1.0e-06 | no, 1.0e-09 | 1.0e-02 |" in report
    assert "- `z-image/bf16` failed: OOM" in report


# -------------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture(scope="module")
def measured() -> Iterator[dict[str, dict]]:
    """The lines of all cases; those of an earlier call are taken from gpu.jsonl."""
    suite("--results", ROOT / "gpu.jsonl", timeout=6 * 3600)
    lines = [json.loads(line) for line in (ROOT / "gpu.jsonl").read_text().splitlines()]
    yield {line["case"]: line for line in lines}


@pytest.mark.gpu
def test_every_case_runs_on_the_gpu(measured: dict[str, dict]) -> None:
    assert set(measured) == set(cases())
    for line in measured.values():
        if "skipped" not in line:
            check(line)


@pytest.mark.gpu
def test_a_resumed_run_has_the_bits_of_one_in_one_go(measured: dict[str, dict]) -> None:
    off = {name: line["resume_off"] for name, line in measured.items() if line.get("resume_exact") is False}
    assert off == {}


@pytest.mark.gpu
def test_memory_is_what_was_computed(measured: dict[str, dict]) -> None:
    off = {}
    for name, line in measured.items():
        for phase, said in line.get("computed_gib", {}).items():
            was = line["gib"].get(phase)
            if was and "offload" not in name and abs(said / was - 1) > 0.15:
                off[f"{name}, {phase}"] = f"computed {said:.2f} GiB, measured {was:.2f}"
    assert off == {}


@pytest.mark.gpu
def test_one_by_one_takes_longer(measured: dict[str, dict]) -> None:
    assert {name: line["ratio"] for name, line in measured.items() if line.get("ratio", 2) < 1} == {}


# -------------------------------------------------------------------------------------------------------- the package


@pytest.mark.skipif(absence() is not None, reason=str(absence()))
def test_packed_suite_needs_nothing_from_outside_its_folder(tmp_path: Path) -> None:
    pack = [sys.executable, str(ROOT / "tools" / "pack_gpu_suite.py"), str(tmp_path / "packed"), "--comfyui"]
    subprocess.run([*pack, str(COMFYUI), "--no-wheels"], check=True, timeout=300)
    again = subprocess.run([*pack, str(COMFYUI), "--no-wheels"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 1
    assert "is not empty: choose another folder" in again.stderr
    environment = {**os.environ, "PYTHON": sys.executable, "COMFYUI_PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [tmp_path / "packed" / "run.sh", "--dry", "--only", "tiny/graph/WAN21_T2V"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [json.loads(line) for line in (tmp_path / "packed" / "gpu.jsonl").read_text().splitlines()]
    check(line)
    assert "| graph/WAN21_T2V |" in (tmp_path / "packed" / "gpu.md").read_text()
