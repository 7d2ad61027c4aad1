"""torch.compile of a network's repeated blocks (`runtime.compile`): one graph per kind of block, shape and use."""

import importlib.util
from typing import Any

import torch
from torch import nn

from ..config import ModelConfig
from ..utils.errors import BadInput

OPTIONS: dict[str, Any] = {"dynamic": False, "options": {"emulate_precision_casts": True}}
"""Of torch.compile. Shapes are static. Where operations are fused, values are rounded as between operations: a block is
fused differently with and without gradient, and without this rounding the two would differ in half precision. PyTorch
does so in code for a GPU alone."""
GRAPHS = 256
"""Graphs of one function, above which what is new runs uncompiled; PyTorch's 8 are too few. A block needs one for each
number of rows and tokens, with and without gradient, and without the LoRA. Blocks of equal shapes share theirs; a UNet
has some twenty different ones."""


def compile_repeated_blocks(network: nn.Module) -> None:
    """Compile the blocks that diffusers names in a network, or else the members of its lists, as SD3's.

    Each compiles when it is first called.
    """
    _allow_graphs()
    if network._repeated_blocks:
        network.compile_repeated_blocks(**OPTIONS)
        return
    for blocks in network.children():
        for block in blocks if isinstance(blocks, nn.ModuleList) else ():
            block.compile(**OPTIONS)


def _allow_graphs() -> None:
    """Let as many graphs be compiled as the shapes of a run need."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.accumulated_recompile_limit = max(GRAPHS, torch._dynamo.config.accumulated_recompile_limit)


def check_compile(model: ModelConfig, device: str) -> None:
    """Check a description with `runtime.compile`.

    Args:
        device: `runtime.device`.

    Raises:
        BadInput: the base model is of a graph, its weights are not plain ones, or this machine has no compiler.
    """
    if model.graph is not None:  # some blocks change tensors in place that their own backward pass needs (FLUX)
        raise BadInput(
            "runtime.compile is true and the base model is of a ComfyUI graph, which is not compiled: set it to false, "
            "or train a diffusers folder"
        )
    if model.sharded or model.quantization:
        kind = model.quantization or "sharded"
        raise BadInput(f"runtime.compile is true and the base model is {kind}, which is not compiled: set it to false")
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if lacking := missing_compiler(on_gpu):
        raise BadInput(
            f"runtime.compile is true, but this machine has no {lacking}: install it, or set runtime.compile to false"
        )
    if model.dtype != "float32" and not on_gpu:  # the compiler for a CPU ignores how values are to be rounded
        raise BadInput(
            f"runtime.compile is true and the base model computes in {model.dtype} on a CPU, where compiled rollouts "
            "and updates round differently: set it to false, or use a float32 base model"
        )


def missing_compiler(on_gpu: bool) -> str | None:
    """What torch.compile needs and this machine does not have; None if it has all."""
    if on_gpu:
        return None if importlib.util.find_spec("triton") else "package triton, which compiles for a GPU"
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        return "C++ compiler (such as g++; the variable CXX names another one)"
    return None
