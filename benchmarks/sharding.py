"""Peak memory of each process while it loads its part of a network: by parts, and as a whole that is divided then.

    python benchmarks/sharding.py --processes 2 --megabytes 600

The network is FLUX.1's with fewer blocks and random float32 weights, in a diffusers folder that is removed afterwards.
The processes (gloo, on a CPU) start anew for each way of loading. The peak is VmHWM, which includes mapped pages of
files, above what the process took before it loaded. Both ways must leave each process the same weights.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
KIND = "FluxTransformer2DModel"
WIDTH = {"attention_head_dim": 64, "num_attention_heads": 12, "joint_attention_dim": 768, "pooled_projection_dim": 64}
WIDTH |= {"axes_dims_rope": (16, 24, 24), "num_single_layers": 0}
WAYS = ("whole", "parts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=600, help="size of the network, about")
    parser.add_argument("--load", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.load[0], Path(args.load[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write(folder, args.megabytes)
        print(f"a network of {size / 1e6:.0f} MB in {args.processes} processes; peak above the start, MB")
        found = {way: in_processes(way, folder, args.processes) for way in WAYS}
    for way, lines in found.items():
        print(f"{way}: {', '.join(str(round(line['peak'] / 1e6)) for line in lines)}")
    same = [line["digest"] for line in found["whole"]] == [line["digest"] for line in found["parts"]]
    print("the same weights" if same else "DIFFERENT WEIGHTS")


def write(folder: Path, megabytes: int) -> int:
    """A network of about this size; returns its bytes."""
    import diffusers

    def network(blocks: int) -> torch.nn.Module:
        return getattr(diffusers, KIND)(**WIDTH, num_layers=blocks)

    with torch.device("meta"):
        small, large = (sum(p.nbytes for p in network(blocks).parameters()) for blocks in (1, 2))
    blocks = max(1, round((megabytes * 1e6 - small) / (large - small)) + 1)
    module = network(blocks)
    module.save_pretrained(folder)
    return sum(p.nbytes for p in module.parameters())


def in_processes(way: str, folder: Path, processes: int) -> list[dict]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    command += [__file__, "--load", way, str(folder)]
    subprocess.run(command, check=True, env=None)
    return [json.loads((folder / f"{way}-{rank}.json").read_text()) for rank in range(processes)]


def load(way: str, folder: Path) -> None:
    """In one of the processes."""
    import accelerate  # noqa: F401 - its memory is not the network's
    import diffusers

    from trainer.models.diffusers.sharding import load_sharded, shard
    from trainer.utils.distributed import Processes

    processes, cpu = Processes("cpu"), torch.device("cpu")
    kind = getattr(diffusers, KIND)
    config = json.loads((folder / "config.json").read_text())
    warm_up(kind, config, shard)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    if way == "parts":
        network = load_sharded(KIND, folder, torch.float32, cpu)
    else:
        whole = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
        network = shard(whole.requires_grad_(False), cpu)
        del whole
    peak = status("VmHWM") - before
    digest = hashlib.sha256()
    for parameter in network.parameters():
        digest.update(parameter.to_local().numpy().tobytes())
    line = {"peak": peak, "digest": digest.hexdigest()}
    (folder / f"{way}-{processes.rank}.json").write_text(json.dumps(line))
    processes.wait()
    processes.close()


def warm_up(kind: type, config: dict, shard: object) -> None:
    """Import what loading imports."""
    with torch.device("meta"):
        tiny = {"num_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 8, "pooled_projection_dim": 8}
        shard(kind.from_config(config | tiny).requires_grad_(False), torch.device("cpu"))


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
