"""The processes that torchrun started, and this one among them. Torch is imported only where something is exchanged."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
SMALLER = "smaller.json"
"""Beside checkpoints: the size of a part that one process's GPU may hold, left there before all of them start again."""


def launched() -> bool:
    """Whether torchrun started this process."""
    return "WORLD_SIZE" in os.environ


@dataclass(frozen=True)
class World:
    """This process among all of them.

    Attributes:
        rank: its number.
        size: how many there are.
        local: its number on its machine, which is its GPU's.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes the outputs."""
        return self.rank == 0

    @property
    def device(self) -> "torch.device":
        """This process's GPU, or the CPU where there is none."""
        import torch

        return torch.device("cuda", self.local) if torch.cuda.is_available() else torch.device("cpu")

    def dealt(self, batches: list[T]) -> list[T]:
        """This process's part of the batches; neighbours, which take as long as each other, go to different ones."""
        return batches[self.rank :: self.size]

    # All processes must call what follows.

    def agreed(self, value: T) -> T:
        """The first process's value, everywhere: what files say may change while the others look."""
        if self.size == 1:
            return value
        held = [value if self.first else None]
        self._group().broadcast_object_list(held, src=0)
        return held[0]  # type: ignore[return-value]

    def gathered(self, value: T) -> list[T]:
        """Every process's value, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._group().all_gather_object(values, value)
        return values

    def gather(self, items: list[T]) -> list[T]:
        """Every process's items in one list, in the order of the ranks."""
        return [item for part in self.gathered(items) for item in part]

    def add(self, values: dict[str, float]) -> dict[str, float]:
        """Sum each value over the processes."""
        if self.size == 1:
            return values
        import torch

        group = self._group()
        on_gpu = group.get_backend() == "nccl"
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device if on_gpu else "cpu")
        group.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            self._group().barrier()

    def _group(self) -> Any:
        """torch.distributed; through gloo where nobody joined before,
        for what is exchanged lies in the host's memory.
        """
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=1))
        return dist


def this_world() -> World:
    """One process alone, or this process's place among those that torchrun started."""
    return World(
        *(int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    )
