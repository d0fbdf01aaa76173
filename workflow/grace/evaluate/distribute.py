"""Several processes that ask one model's questions together, one GPU each (or, to try it, one core each).

Every process walks through the same benchmarks with a model of its own; batches are dealt out, and after each
benchmark all have all answers. Batches are cut as one process would cut them, so that the answers are the same.
"""

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")


class Share:
    """This process among `size`; alone unless torchrun started it."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))  # number of this process's GPU

    @property
    def first(self) -> bool:
        """Whether this process writes the predictions."""
        return self.rank == 0

    def agreed(self, value: T) -> T:
        """The first process's value, everywhere: what files say may change while the others look."""
        if self.size == 1:
            return value
        held = [value if self.first else None]
        self._joined().broadcast_object_list(held, src=0)
        return held[0]

    def dealt(self, batches: list[T]) -> list[T]:
        """This process's part of the batches; neighbours, which take as long as each other, go to different ones."""
        return batches[self.rank :: self.size]

    def gathered(self, value: Any) -> Iterable[Any]:
        """Every process's value, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._joined().all_gather_object(values, value)
        return values

    def _joined(self) -> Any:
        import torch.distributed as dist

        if not dist.is_initialized():  # gloo: what is exchanged are Python objects in memory
            dist.init_process_group("gloo", timeout=timedelta(days=1))
        return dist
