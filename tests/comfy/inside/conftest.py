"""ComfyUI in this process, on the CPU, and the pack loaded by file location, as ComfyUI does it."""

import asyncio
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import comfy.cli_args
import pytest
import torch

comfy.cli_args.args.cpu = True
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "tests"))
NAME = "dancegrpo_x_pack"


def load_pack() -> None:
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)


def imported_with_the_nodes() -> set[str]:
    """Top-level packages that loading the nodes and reading their schemas adds to a ComfyUI that has started."""
    import server  # noqa: F401 - all this is there before ComfyUI loads a pack

    before = set(sys.modules)
    load_pack()
    extension = asyncio.run(sys.modules[NAME].comfy_entrypoint())
    for node in asyncio.run(extension.get_node_list()):
        node.GET_SCHEMA()
    return {name.split(".")[0] for name in set(sys.modules) - before}


IMPORTED = imported_with_the_nodes()


@pytest.fixture(scope="session")
def imported() -> set[str]:
    return IMPORTED


@pytest.fixture(scope="session")
def pack() -> object:
    """`pack("nodes.sampling")` is that module of the pack."""

    def module(name: str) -> ModuleType:
        return importlib.import_module(f"{NAME}.{name}")

    return module


@pytest.fixture(scope="session")
def demo(pack: object) -> SimpleNamespace:
    """The embedded model: `model`, `clip`, `vae`, and `sample`, which samples with it."""
    module = pack("nodes.demo")
    clip = module.load_clip()
    encode = lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))  # noqa: E731
    return SimpleNamespace(model=module.load_model(), clip=clip, vae=module.load_vae(), encode=encode)


@pytest.fixture(scope="session")
def sample(demo: SimpleNamespace) -> object:
    """Sample as SamplerCustomAdvanced does; gives latents in the model's own scale."""
    import comfy.samplers

    positive, negative = demo.encode("a red circle above a blue square"), demo.encode("")

    def run(
        sampler: object,
        sigmas: torch.Tensor,
        noise: torch.Tensor,
        *,
        model: object = demo.model,
        conds: tuple = (positive, negative),
        cfg: float = 1.0,
        latent: torch.Tensor | None = None,
        **options: object,
    ) -> torch.Tensor:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*conds)
        guider.set_cfg(cfg)
        latent = torch.zeros_like(noise) if latent is None else latent
        done = guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=1, **options)
        return model.model.process_latent_in(done)

    return run


@pytest.fixture(scope="session")
def noise() -> torch.Tensor:
    return torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(5))
