"""Runs warp-specialised Gluon kernels on a CPU: each program's warp groups are threads, and tensors are torch's.

What a kernel computes, which addresses it touches and how its threads wait for each other are as on a GPU; layouts of
registers and shared memory mean nothing here (the compiler checks those). Reads and writes outside of known tensors are
errors, and so is a wait that nobody ends. Only what the project's kernels use is here.
"""

import builtins
import inspect
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from gluon_values import Memory, Pointer, PointerType, Shared, Tensor, here, unwrap
from ptx import run as run_ptx

PATIENCE = 120  # seconds that a kernel may take


class TensorDescriptor:
    """A matrix of which the copy engine brings blocks, with zeros where they reach past it."""

    def __init__(self, base, shape, strides, block_shape, layout) -> None:
        assert strides == [shape[1], 1] and base.is_contiguous()
        self.matrix, self.block, self.layout, self.dtype = base.view(shape), block_shape, layout, base.dtype

    def _inside(self, at) -> torch.Tensor:
        row, column = (int(i) for i in at)
        return self.matrix[row : row + self.block[0], column : column + self.block[1]]

    def fetch(self, at, full: Shared, to: Shared) -> None:
        assert to.shape == tuple(self.block)
        inside = self._inside(at)
        to.t.zero_()[: inside.shape[0], : inside.shape[1]] = inside
        here.barriers.arrive(full, 0, -to.t.nbytes)

    def write(self, at, block: Shared) -> None:
        inside = self._inside(at)
        inside.copy_(block.t[: inside.shape[0], : inside.shape[1]])


class Barriers:
    """The barriers of a launch, by address: a phase ends when all that it waits for have arrived, bytes too."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        # Arrivals of a phase, those missing, parity of the phase, bytes missing.
        self.state: dict[int, list[int]] = {}
        self.failed = False
        self.end = time.monotonic() + PATIENCE

    def init(self, at: Shared, count: int) -> None:
        self.state[at.t.data_ptr()] = [count, count, 0, 0]

    def arrive(self, at: Shared, count: int = 1, more_bytes: int = 0) -> None:
        with self.condition:
            state = self.state[at.t.data_ptr()]
            state[1] -= count
            state[3] += more_bytes
            assert state[1] >= 0 and state[3] >= 0, "more arrivals or bytes than a barrier waits for"
            if state[1] == state[3] == 0:
                state[1], state[2] = state[0], state[2] ^ 1
                self.condition.notify_all()

    def wait(self, at: Shared, parity) -> None:
        """Until the phase of this parity has ended."""
        with self.condition:
            state = self.state[at.t.data_ptr()]
            while state[2] == int(parity):
                self.check()
                self.condition.wait(0.05)

    def check(self) -> None:
        if self.failed or time.monotonic() > self.end:
            raise TimeoutError("a barrier that nobody reaches" if not self.failed else "another thread failed")


def _threads(work: list[Callable[[], None]], barriers: Barriers) -> None:
    """Run all at once; the first error of any is raised."""
    errors: list[BaseException] = []

    def guarded(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:
            errors.append(error)
            barriers.failed = True

    running = [threading.Thread(target=guarded, args=(one,)) for one in work]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for error in sorted(errors, key=lambda error: isinstance(error, TimeoutError)):
        raise error


class Jit:
    """A jitted function: called by another one, or launched over a grid of programs that all run at once."""

    def __init__(self, fn: Callable, memory: Memory) -> None:
        self.fn, self.memory = fn, memory

    def __call__(self, *args, **kwargs):
        return self.fn(*args, **kwargs)

    def __getitem__(self, grid: tuple[int]):
        return lambda *args, **kwargs: self._launch(grid[0], args, kwargs)

    def _launch(self, programs: int, args: tuple, kwargs: dict) -> None:
        known = inspect.signature(self.fn).parameters
        kwargs = {name: value for name, value in kwargs.items() if name in known}  # without num_warps and the like
        self.memory.know(arg for arg in args if isinstance(arg, torch.Tensor))
        args = [Pointer(self.memory, a.data_ptr(), a.dtype) if isinstance(a, torch.Tensor) else a for a in args]
        barriers = Barriers()

        def program(pid: int) -> None:
            here.program, here.programs, here.warps = pid, programs, 4
            here.memory, here.barriers = self.memory, barriers
            self.fn(*args, **kwargs)

        _threads([lambda pid=pid: program(pid) for pid in range(programs)], barriers)


_atomic = threading.Lock()


def _load(pointer: Pointer, mask=None, other=0.0, **_) -> Tensor:
    flat, at, ok = pointer.places(mask)
    got = torch.full(at.shape, unwrap(other), dtype=flat.dtype)
    got[ok] = flat[at[ok]]
    return Tensor(got)


def _store(pointer: Pointer, value, mask=None, **_) -> None:
    flat, at, ok = pointer.places(mask)
    flat[at[ok]] = torch.as_tensor(unwrap(value)).to(flat.dtype).expand(at.shape)[ok]


def _copy(to: Shared, pointer: Pointer, mask=None) -> None:
    """What the mask leaves out becomes zeros."""
    to.t.copy_(_load(pointer, mask, 0).t)


def _atomic_add(pointer: Pointer, value, **_) -> Tensor:
    with _atomic:
        before = _load(pointer)
        _store(pointer, before + value)
        return before


def _assembly(text: str, constraints: str, args: list, dtype, **_):
    text = getattr(text, "value", text)  # a constexpr of a module that is Triton's own
    if text.startswith("ld.acquire"):  # a look at another program's counter
        here.barriers.check()
        time.sleep(1e-4)
        return _load(args[0])
    pairs = []  # of 16-bit numbers in a register, of 32-bit ones in two
    for arg in args:
        pairs += arg.t.contiguous().view(torch.int32).view(-1, arg.dtype.itemsize // 2).T.contiguous()
    registers = run_ptx(text, pairs, len(dtype))
    return tuple(Tensor(r.view(kind).view(args[0].shape)) for r, kind in zip(registers, dtype, strict=True))


def _specialize(work: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]) -> None:
    place = dict(vars(here))

    def group(fn: Callable, args: tuple, count: int) -> None:
        vars(here).update(place, warps=count)
        fn(*args)

    counts = [place["warps"], *warps]
    _threads(
        [lambda fn=fn, args=args, n=n: group(fn, args, n) for (fn, args), n in zip(work, counts, strict=True)],
        place["barriers"],
    )


def _reduce(values: tuple[Tensor, ...], axis: int, combine: Callable) -> tuple[Tensor, ...]:
    values = tuple(Tensor(v.t.movedim(axis, 0)) for v in values)
    while len(values[0].t) > 1:
        half = len(values[0].t) // 2
        values = combine(*(v[:half] for v in values), *(v[half:] for v in values))
    return tuple(v[0] for v in values)


def _both(operation: Callable):
    def of(a, b) -> Tensor:
        kind = next((v.dtype for v in (a, b) if isinstance(v, Tensor)), None)  # a plain number takes the other's type
        return Tensor(operation(*(v.t if isinstance(v, Tensor) else torch.tensor(v, dtype=kind) for v in (a, b))))

    return of


def _one(operation: Callable):
    return lambda x: Tensor(operation(x.t))


def _where(condition, a, b) -> Tensor:
    a, b = (unwrap(v) if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float32) for v in (a, b))
    return Tensor(torch.where(unwrap(condition), a, b))


def _range(*bounds):
    """Of kernels' numbers, as Triton has it, where a bound is one of them."""
    numbers = range(*bounds)
    return (
        (Tensor(torch.tensor(i, dtype=torch.int32)) for i in numbers)
        if any(isinstance(b, Tensor) for b in bounds)
        else numbers
    )


def _language() -> ModuleType:
    gl = ModuleType("language")
    for name in ("int8", "int16", "int32", "int64", "float16", "bfloat16", "float32"):
        setattr(gl, name, getattr(torch, name))
    for name in ("BlockedLayout", "SliceLayout", "DotOperandLayout", "DistributedLinearLayout", "SwizzledSharedLayout",
                 "NVMMADistributedLayout", "NVMMASharedLayout"):  # fmt: skip
        setattr(gl, name, lambda *args, **kwargs: None)
    for name in ("maximum", "minimum"):
        setattr(gl, name, _both(getattr(torch, name)))
    for name in ("abs", "exp", "exp2", "floor", "log2", "rsqrt"):
        setattr(gl, name, _one(getattr(torch, name)))
    gl.constexpr = lambda value: value
    gl.pointer_type, gl.shared_memory_descriptor = PointerType, Shared
    gl.program_id = lambda axis: Tensor(torch.tensor(here.program, dtype=torch.int32))
    gl.num_programs = lambda axis: here.programs
    gl.static_range, gl.barrier = range, lambda: None  # a group of warps is one thread here
    gl.multiple_of = lambda value, _: value
    gl.convert_layout = lambda value, layout, **_: value
    gl.arange = lambda start, end, layout: Tensor(torch.arange(start, end, dtype=torch.int32))
    gl.zeros = lambda shape, dtype, layout: Tensor(torch.zeros(shape, dtype=dtype))
    gl.full = lambda shape, value, dtype, layout: Tensor(torch.full(shape, value, dtype=dtype))
    gl.expand_dims = lambda value, axis: Tensor(value.t.unsqueeze(axis))
    gl.broadcast = lambda a, b: tuple(Tensor(t) for t in torch.broadcast_tensors(a.t, b.t))
    gl.join = lambda a, b: Tensor(torch.stack((a.t, b.t), -1))
    gl.sum = lambda value, axis: Tensor(value.t.sum(axis))
    gl.max = lambda value, axis: Tensor(value.t.amax(axis))
    gl.reduce, gl.where, gl.load, gl.store, gl.atomic_add = _reduce, _where, _load, _store, _atomic_add
    gl.inline_asm_elementwise, gl.warp_specialize = _assembly, _specialize
    # Memory that nobody has written yet is NaN, or words and scales of all ones.
    gl.allocate_shared_memory = lambda dtype, shape, layout: Shared(
        torch.full((torch.Size(shape).numel() * dtype.itemsize,), 255, dtype=torch.uint8).view(dtype).view(shape)
    )
    return gl


def load(*paths: Path) -> tuple[ModuleType, Memory]:
    """The modules at `paths`, each able to import those before it, for a CPU; the last one, and what it can reach."""
    memory = Memory()

    def jit(fn=None, **_):
        return Jit(fn, memory) if fn else lambda fn: Jit(fn, memory)

    mbarrier = SimpleNamespace(
        init=lambda at, count: here.barriers.init(at, count),
        wait=lambda at, parity: here.barriers.wait(at, parity),
        arrive=lambda at: here.barriers.arrive(at),
        expect=lambda at, bytes_: here.barriers.arrive(at, 1, bytes_),
        MBarrierLayout=lambda: None,
    )
    async_copy = SimpleNamespace(
        async_load=_copy,
        commit_group=lambda: None,
        wait_group=lambda outstanding: None,
        mbarrier_arrive=lambda at, increment_count: here.barriers.arrive(at, 32 * here.warps),
    )
    nvidia = SimpleNamespace(
        async_copy=async_copy,
        mbarrier=mbarrier,
        mma_v2=lambda a, b, acc: Tensor(a.t.float() @ b.t.float() + acc.t),
        warpgroup_mma=lambda a, b, acc, **_: Tensor(a.t.float() @ b.t.float() + acc.t),
        warpgroup_mma_init=lambda acc: acc,
        warpgroup_mma_wait=lambda outstanding, deps: deps[0],
        fence_async_shared=lambda: None,
        tma=SimpleNamespace(
            async_load=TensorDescriptor.fetch, async_store=TensorDescriptor.write, store_wait=lambda outstanding: None
        ),
    )
    dependent = SimpleNamespace(gdc_wait=lambda: None, gdc_launch_dependents=lambda: None)
    language = _language()
    modules = {
        "triton.experimental": SimpleNamespace(gluon=SimpleNamespace(jit=jit, constexpr_function=lambda fn: fn)),
        "triton.experimental.gluon": SimpleNamespace(language=language),
        "triton.experimental.gluon.language.nvidia.ampere": nvidia,
        "triton.experimental.gluon.language.nvidia.hopper": nvidia,
        "triton.experimental.gluon.nvidia.hopper": SimpleNamespace(TensorDescriptor=TensorDescriptor),
        "triton.language.extra.cuda": dependent,
    }

    def imported(name: str, *args, **kwargs):
        return modules[name] if name in modules else builtins.__import__(name, *args, **kwargs)

    for path in paths:
        module = ModuleType(path.stem)
        module.__builtins__ = {**vars(builtins), "__import__": imported, "range": _range}
        exec(compile(path.read_text(), path, "exec"), vars(module))
        modules[f"grace.kernels.{path.stem}"] = module
    return module, memory
