"""What `gluon_on_cpu` makes of a kernel's tensors, pointers and shared memory: torch's tensors."""

import operator
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch

here = threading.local()  # the program, the barriers and the number of warps that a thread stands for


class Memory:
    """The tensors that pointers may point into, by address."""

    def __init__(self) -> None:
        self.tensors: dict[int, torch.Tensor] = {}
        self.starts: list[int] = []

    def know(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let kernels reach these contiguous tensors."""
        for tensor in tensors:
            assert tensor.is_contiguous()
            self.tensors[tensor.data_ptr()] = tensor
        self.starts = sorted(self.tensors)

    def find(self, address: int, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """The tensor at or before an address, flat and as `dtype`, and the address as an index into it."""
        start = self.starts[bisect_right(self.starts, address) - 1]
        flat = self.tensors[start].view(-1).view(dtype)
        return flat, (address - start) // dtype.itemsize


class PointerType:
    def __init__(self, element_ty: torch.dtype) -> None:
        self.element_ty = element_ty


class Pointer:
    """An address in `memory`, or a tensor of them: base + offsets, counted in elements."""

    def __init__(self, memory: Memory, base: int, element: torch.dtype, offset: torch.Tensor | int = 0) -> None:
        self.memory, self.base, self.offset, self.dtype = memory, base, offset, PointerType(element)

    def __add__(self, more):
        more = more.t.long() if isinstance(more, Tensor) else more
        return Pointer(self.memory, self.base, self.dtype.element_ty, self.offset + more)

    def places(self, mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The flat tensor, the indices, and which of them count."""
        flat, start = self.memory.find(self.base, self.dtype.element_ty)
        at = torch.as_tensor(self.offset) + start
        ok = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(unwrap(mask)).expand(at.shape)
        assert not ((at < 0) | (at >= len(flat)))[ok].any(), f"{self.dtype.element_ty} outside of its tensor"
        return flat, at, ok


class Tensor:
    """What a kernel calls a tensor; numbers that kernels load have no dimensions."""

    def __init__(self, t: torch.Tensor) -> None:
        self.t = t

    shape = property(lambda self: tuple(self.t.shape))
    dtype = property(lambda self: self.t.dtype)
    type = SimpleNamespace(layout=None)

    def to(self, dtype, bitcast: bool = False):
        if isinstance(dtype, PointerType):
            return Pointer(here.memory, int(self.t), dtype.element_ty)
        return Tensor(self.t.view(dtype) if bitcast else self.t.to(dtype))

    def reshape(self, shape):
        return Tensor(self.t.reshape(shape))

    def permute(self, order):
        return Tensor(self.t.permute(order))

    def split(self):
        return Tensor(self.t[..., 0]), Tensor(self.t[..., 1])

    def __getitem__(self, index):
        return Tensor(self.t[index])

    def __neg__(self):
        return Tensor(-self.t)

    def __bool__(self):
        return bool(self.t)

    def __index__(self):
        return int(self.t)


def unwrap(value):
    return value.t if isinstance(value, Tensor) else value


def _binary(operation: Callable, swapped: bool = False):
    def method(self, other):
        if isinstance(other, Pointer):
            return NotImplemented
        a, b = self.t, unwrap(other)
        return Tensor(operation(b, a) if swapped else operation(a, b))

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"):
    _operation = getattr(operator, _name + "_" if _name in ("and", "or") else _name)
    setattr(Tensor, f"__{_name}__", _binary(_operation))
    setattr(Tensor, f"__r{_name}__", _binary(_operation, swapped=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Tensor, f"__{_name}__", _binary(getattr(operator, _name)))


class Shared:
    """A piece of a program's shared memory, or a barrier in it."""

    def __init__(self, t: torch.Tensor) -> None:
        self.t = t

    shape = property(lambda self: tuple(self.t.shape))

    def index(self, i):
        return Shared(self.t[int(i)])

    def slice(self, start, length, dim=0):
        return Shared(self.t.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.t.permute(order))

    def load(self, layout):
        return Tensor(self.t.clone())

    def store(self, value):
        assert self.t.shape == value.t.shape and self.t.dtype == value.t.dtype
        self.t.copy_(value.t)

    def reinterpret(self, dtype, shape, layout):
        """The beginning of the same bytes; more than there are is an error."""
        bytes_ = self.t.view(-1).view(torch.uint8)
        return Shared(bytes_[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape))
