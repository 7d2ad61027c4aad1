"""Memory of a computation, counted tensor by tensor; on PyTorch's meta device nothing is computed."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@torch.no_grad()
def peak_bytes(call: Callable[[], object]) -> int:
    """Largest memory of a call without gradients, its result included and what exists before it not."""
    with FusedAttention(), AllocatedBytes() as counter:
        call()
    return counter.peak


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are created inside and still referenced.

    Workspaces of kernels, fragmentation and the device's context are not counted.

    Attributes:
        now: the current sum.
        peak: the largest sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {value.untyped_storage()._cdata for value in _tensors((args, kwargs or {}))}
        result = function(*args, **(kwargs or {}))
        for value in _tensors(result):
            storage = value.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._known:
                self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class FusedAttention(TorchFunctionMode):
    """Attention takes the memory of a fused kernel, which stores no matrix of scores. Its values are undefined."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3] if len(args) > 2 else (*args, *(kwargs or {}).values())[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return function(*args, **(kwargs or {}))


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))
