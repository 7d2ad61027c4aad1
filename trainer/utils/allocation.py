"""Measures the memory of a computation by counting tensors, also on the meta device, where nothing is computed."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak memory in bytes of the tensors that a call creates, including its result."""
    with fused_attention(), AllocatedBytes() as counter:
        call()
    return counter.peak


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are created in this context and still referenced.

    Kernel workspaces, fragmentation and the CUDA context are not counted.

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


@contextmanager
def fused_attention() -> Iterator[None]:
    """In this context, attention on the meta device needs the memory of a fused kernel, without the score matrix.

    The function is replaced, because dispatch modes are not active when checkpointing recomputes activations.
    """
    functional = torch.nn.functional
    original = functional.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kw: Any
    ) -> Tensor:
        if query.device.type != "meta":
            return original(query, key, value, attn_mask, *args, **kw)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = query.new_empty(attn_mask.shape)  # PyTorch converts it to floats
        return attention_memory(query, key, value, (*query.shape[:-1], value.shape[-1]), attn_mask)

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def attention_memory(
    query: Tensor, key: Tensor, value: Tensor, shape: tuple[int, ...], mask: Tensor | None = None
) -> Tensor:
    """An output of this shape, with the memory that a fused attention kernel takes forward and backward."""
    return _Attention.apply(query, key, value, shape, mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, query: Tensor, key: Tensor, value: Tensor, shape: tuple[int, ...], mask: Tensor | None
    ) -> Tensor:
        output = query.new_empty(shape)
        rows = query.numel() // query.shape[-1]  # the logsumexp of each query and head
        context.save_for_backward(query, key, value, output, query.new_empty(rows, dtype=torch.float32), mask)
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple:
        return *(torch.empty_like(value) for value in context.saved_tensors[:3]), None, None


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))
