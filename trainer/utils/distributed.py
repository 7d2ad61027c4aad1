"""One process or many: who am I, and sums and lists over all of us. Thin over accelerate."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor


class Processes:
    """The processes that share a run; with one, every call is the identity."""

    def __init__(self, device: str = "auto") -> None:
        self.state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        self.rank: int = self.state.process_index
        self.count: int = self.state.num_processes
        self.device: torch.device = self.state.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> range:
        """This process's part of `total` items: contiguous, and as even as can be."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all processes, in order of rank."""
        return list(items) if self.count == 1 else gather_object(items)

    def broadcast(self, value: Any) -> Any:
        """The first process's value."""
        return value if self.count == 1 else broadcast_object_list([value])[0]

    def sum_(self, tensors: list[Tensor]) -> None:
        """Add tensors up over all processes, in place, in one message."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def most(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.count == 1:
            return number
        value = torch.tensor([number], device=self.device)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return int(value.item())

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        return bool(self.most(int(flag)))

    def wait(self) -> None:
        self.state.wait_for_everyone()

    def close(self) -> None:
        self.state.destroy_process_group()
