"""Shared pieces: tiny random models in real file layouts, and small run descriptions."""

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


def build_tiny_sd3(folder: Path) -> Path:
    """A random StableDiffusion3Pipeline folder: one block, 16 x 16 images, the classes and files of the real one."""
    from tools import pretrain_shapes
    from trainer.shapes import WEIGHTS

    torch.manual_seed(0)
    # Learning a tokenizer anew would break ties at random: another model in every process.
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(WEIGHTS / name, folder / name)
    from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    for name in ("text_encoder", "text_encoder_2"):
        pretrain_shapes.build_text_encoder(tokenizer).save_pretrained(folder / name)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=128,
        caption_projection_dim=32,
        pooled_projection_dim=128,
        pos_embed_max_size=4,
    )
    for parameter in transformer.parameters():  # diffusers starts the last layers at zero; a trained model does not
        torch.nn.init.normal_(parameter, std=0.1)
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    vae.save_pretrained(folder / "vae")
    pretrain_shapes.drop_written_keys(folder / "vae")
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(pretrain_shapes.MODEL_INDEX))
    return folder


@pytest.fixture(scope="session", autouse=True)
def system_temporary_folder(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[None]:
    """A folder of pytest's in place of the system's, here and in every process that is started: some are killed.

    What PyTorch compiles is kept beside pytest's cache, because compiling anew takes a minute and a half.
    """
    folder = tmp_path_factory.mktemp("system")
    with pytest.MonkeyPatch.context() as changed:
        for name in ("TMPDIR", "TEMP", "TMP"):
            changed.setenv(name, str(folder))
        changed.setattr(tempfile, "tempdir", None)
        cache = getattr(pytestconfig, "cache", None)  # none with `-p no:cacheprovider`
        if cache is not None and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            changed.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache.mkdir("inductor")))
        yield


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test's random numbers do not depend on the tests before it, which differ with the number of processes."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny_sd3"))


PROMPTS = ["a red circle", "a blue square", "two triangles", "a circle above a square"]


@pytest.fixture
def tiny_description(tiny_sd3: Path) -> dict:
    """A run of four short iterations on the tiny model; plain data, free to be changed."""
    return copy.deepcopy(
        {
            "model": {"family": "sd3", "path": str(tiny_sd3), "height": 16, "width": 16},
            "prompts": {"texts": PROMPTS},
            "rollout": {"steps": 5, "shift": 1.0, "eta": 0.5, "group_size": 4, "prompts_per_iteration": 2},
            "rewards": [{"name": "brightness"}, {"name": "colorfulness", "weight": 0.5}],
            "objective": {"updates": 2},
            "lora": {"rank": 4, "alpha": 8, "ema_decay": 0.5},
            "optimizer": {"learning_rate": 1e-3},
            "evaluation": {"texts": ["a green circle", "a red square"], "images_per_prompt": 2, "every": 2},
            "runtime": {"iterations": 4, "seed": 3, "device": "cpu", "samples_every": 2},
        }
    )


def write_description(path: Path, description: dict) -> Path:
    path.write_text(json.dumps(description))
    return path


def run_program(*arguments: object, check: bool = True, **options: object) -> subprocess.CompletedProcess:
    """Run `python -m trainer` in a real process with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "trainer", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=check,
        timeout=900,
        **options,
    )


class Child:
    """A running process of the program; its output goes to a file."""

    def __init__(self, server: "Forks", pid: int, log: Path) -> None:
        self.server, self.pid, self.log = server, pid, log

    def wait(self, timeout: float = 600) -> int:
        """Exit code; negative for a signal."""
        code = self.server.ask({"pid": self.pid, "timeout": timeout})
        assert code is not None, f"process still runs after {timeout} s:\n{self.output}"
        return code

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


class Forks:
    """Starts real processes of the program in milliseconds: forks of one that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("fork_server.py")],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict) -> object:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *arguments: object, die: tuple[str, int] | None = None, file_size: int | None = None) -> Child:
        """Start `python -m trainer` with these arguments.

        Args:
            die: where the process is to kill itself: a place of fork_server.arm and a number of calls.
            file_size: no file may grow beyond this many bytes.
        """
        self.count += 1
        log = self.folder / f"{self.count}.log"
        words = [str(argument) for argument in arguments]
        pid = self.ask({"arguments": words, "output": str(log), "die": die, "file_size": file_size})
        return Child(self, pid, log)

    def run(self, *arguments: object, **options: object) -> tuple[int, str]:
        """Exit code and output of a process that is waited for."""
        child = self.start(*arguments, **options)
        code = child.wait()
        return code, child.output


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.process.stdin.close()
    forks.process.wait(timeout=60)


def lora_of(run: Path, name: str = "lora.safetensors") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / name)


def assert_same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    assert first
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def results_of(run: Path) -> list[dict]:
    """The events of a run without what depends on the clock or the machine."""
    lines = (run / "events.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "memory_mb")} for line in lines]


NO_GPU = "no GPU: torch.cuda.is_available() is false"
LONGEST = (
    "tests/comfy/test_inside.py",
    "tests/test_gpu_suite.py",
    "tests/comfy/test_training.py",
    "tests/models/test_families.py",
    "tests/comfy/test_workflows.py",
    "tests/comfy/test_votes.py",
    "tests/comfy/test_panel_follow.py",
)
"""Files that come first, the longest of all first, so that no process is left alone with one of them at the end."""
ALONE = ("tests/comfy/test_inside.py",)
"""Files whose tests share no fixture, and take long: each test is on its own for the processes of `make test`."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """With `--dist loadfile`, the tests of a file in `ALONE` need not be in one process."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if file in ALONE else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and skip tests marked `gpu` where there is none; the summary says so."""
    place = {file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.split("::")[0], len(LONGEST)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from comfy_host import absence

    reason = absence()
    if reason:
        terminalreporter.write_line(f"ComfyUI was absent, so tests/comfy was skipped: {reason}", yellow=True)
    left_out = [report for report in terminalreporter.stats.get("skipped", []) if NO_GPU in str(report.longrepr)]
    if left_out:
        terminalreporter.write_line(f"{len(left_out)} tests marked gpu were skipped: {NO_GPU}", yellow=True)
