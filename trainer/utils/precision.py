"""How float32 is multiplied on NVIDIA GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """In this context, float32 matrix products and convolutions on a GPU may round their factors to TF32, or may not.

    Both of PyTorch's switches are set, whose own defaults differ, and set back afterwards. Nothing changes on a CPU.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = enabled
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
