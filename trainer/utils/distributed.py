"""Collective operations over the processes of a run; a thin layer over accelerate."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor


class Processes:
    """The processes of a run. With one process, all operations are trivial.

    With several, every method except `share` is collective: all processes must call it, in the same order.
    """

    def __init__(self, device: str = "auto") -> None:
        self.state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        self.rank: int = self.state.process_index
        self.count: int = self.state.num_processes
        self.device: torch.device = self.state.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> range:
        """This rank's part of `total` items: contiguous, and as even as possible."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all ranks joined, in order of rank."""
        return list(items) if self.count == 1 else gather_object(items)

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0."""
        return value if self.count == 1 else broadcast_object_list([value])[0]

    def sum_(self, tensors: list[Tensor]) -> None:
        """Sum tensors over all ranks in place, with one all-reduce."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def most(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        if self.count == 1:
            return number
        value = torch.tensor([number], device=self.device)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return int(value.item())

    def any(self, flag: bool) -> bool:
        """Whether the flag is True in any rank."""
        return bool(self.most(int(flag)))

    def wait(self) -> None:
        """Wait for all ranks."""
        self.state.wait_for_everyone()

    def close(self) -> None:
        """Destroy the process group."""
        self.state.destroy_process_group()
