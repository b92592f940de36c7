"""An emulator for Hopper kernels in Gluon: `run` executes the kernel's own functions on the CPU and finds errors of synchronisation.

The partitions of `gl.warp_specialize` take turns: before each operation on shared memory or a barrier, a seeded scheduler may go on with
another one or let a TMA load land. `gluon_machine` has the scheduler and finds races, `gluon_language` translates and computes. Not
emulated: layouts, registers, integer overflow, and races in global memory.
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.kernels.gluon_language import FUNCTIONS, EmulationError, Pointer, Translator, steps
from tests.kernels.gluon_machine import Barrier, Machine, Memory, Order, Race, Transfer, kernel_line

LAUNCH_OPTIONS = {"num_warps", "num_ctas", "num_stages", "maxnreg", "enable_fp_fusion"}


class Descriptor:
    """A TMA descriptor as the kernel sees it."""

    def __init__(self, host: Any) -> None:
        self.shape, self.block_shape, self.layout, self.dtype = list(host.shape), list(host.block_shape), host.layout, host.base.dtype
        self.tensor = host.base.as_strided(host.shape, host.strides)
        self.padding = float("nan") if host.padding == "nan" else 0
        self.nbytes_per_cta = torch.Size(self.block_shape).numel() * self.dtype.itemsize
        self.block_type = SimpleNamespace(shape=self.block_shape, nbytes=self.nbytes_per_cta, element_ty=self.dtype)

    def box(self, coordinates: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of the tensor that a box covers, and where in the box it lies."""
        axes = list(zip(map(int, coordinates), self.block_shape, self.shape, strict=True))
        part = self.tensor[tuple(slice(min(max(start, 0), n), max(min(start + box, n), 0)) for start, box, n in axes)]
        starts = (max(-start, 0) for start, _, _ in axes)
        return part, tuple(slice(start, start + n) for start, n in zip(starts, part.shape, strict=True))

    def load(self, coordinates: Sequence[int], memory: Memory) -> None:
        box = torch.full(self.block_shape, self.padding, dtype=self.dtype)
        part, inside = self.box(coordinates)
        box[inside] = part
        memory.data.copy_(box.reshape(memory.shape))

    def store(self, coordinates: Sequence[int], memory: Memory) -> None:
        part, inside = self.box(coordinates)
        part.copy_(memory.data.reshape(self.block_shape)[inside])


class Accumulator:
    """The result of an asynchronous product, for which a wait returns a tensor."""

    def __init__(self, value: Tensor | None = None) -> None:
        self.value = value

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise EmulationError("an accumulator is used before the wait for its product")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = __getitem__ = _refuse
    __getattr__ = _refuse
    __torch_function__ = classmethod(_refuse)


class MBarriers:
    """`hopper.mbarrier`."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def MBarrierLayout(self, *_: Any) -> None:
        pass

    def allocate_mbarrier(self, batch: int | None = None) -> Generator[None, None, Memory]:
        return self.machine.allocate(torch.int64, [1] if batch is None else [batch, 1])

    def init(self, memory: Memory, count: int) -> Iterator[None]:
        yield
        barriers, at = memory.allocation.barriers, memory.data.storage_offset()
        if at in barriers:
            raise EmulationError(f"{memory.name} is initialised twice")
        barriers[at] = Barrier(memory, count, self.machine.event(), pending_arrivals=count)
        self.machine.order.seen |= barriers[at].initialised

    def invalidate(self, memory: Memory) -> Iterator[None]:
        yield
        self.machine.barrier(memory)
        del memory.allocation.barriers[memory.data.storage_offset()]

    def expect(self, memory: Memory, bytes_per_cta: int | None = None, pred: Any = True, *, bytes: int = 0) -> Iterator[None]:
        yield
        if pred:
            self.machine.barrier(memory).arrive(1, bytes_per_cta or bytes, self.machine.order)

    def arrive(self, memory: Memory, *, count: int = 1, pred: Any = True) -> Iterator[None]:
        yield
        if pred:
            self.machine.barrier(memory).arrive(count, 0, self.machine.order)

    def wait(self, memory: Memory, phase: int, pred: Any = True, deps: Sequence[Memory] = ()) -> Iterator[None]:
        if phase not in (0, 1):
            raise EmulationError(f"the phase of a wait is 0 or 1, got {phase=} at {memory.name}")
        if pred:
            yield from self.machine.wait(self.machine.barrier(memory), int(phase))


class TMA:
    """`hopper.tma`."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def async_load(self, descriptor: Descriptor, coord: Sequence[int], barrier: Memory, result: Memory, pred: Any = True) -> Iterator[None]:
        machine = self.machine
        yield
        if not pred:
            return
        found, nbytes = machine.barrier(barrier), descriptor.nbytes_per_cta
        if not machine.order.fenced & found.initialised:
            raise Race(f"a TMA load needs a fence_async_shared after mbarrier.init of {barrier.name}")
        _check_box(descriptor, result)
        event = machine.access(result, "TMA load", write=True, asynchronous=True)
        order = replace(machine.order, seen=machine.order.seen | event)

        def land() -> None:
            descriptor.load(coord, result)
            found.arrive(0, -nbytes, order)

        result.data.fill_(float("nan"))
        machine.in_flight.append(Transfer(land, order, machine.load_speed))
        machine.loads.append((event, f"TMA load of {result.name} by {machine.current.name} at {kernel_line()}"))

    def async_store(self, descriptor: Descriptor, coord: Sequence[int], src: Memory) -> Iterator[None]:
        yield
        _check_box(descriptor, src)
        event = self.machine.access(src, "TMA store", asynchronous=True)
        self.machine.current.stores.append(Transfer(lambda: descriptor.store(coord, src), Order(event)))

    def store_wait(self, pendings: int, read_only: bool = True) -> Iterator[None]:
        yield
        self.machine.current.retire(self.machine.current.stores, pendings)

    async_copy_global_to_shared, async_copy_shared_to_global = async_load, async_store  # their names in Triton 3.6


def _check_box(descriptor: Descriptor, memory: Memory) -> None:
    if (memory.data.numel(), memory.dtype) != (torch.Size(descriptor.block_shape).numel(), descriptor.dtype):
        box = f"{descriptor.block_shape} {descriptor.dtype}"
        raise EmulationError(f"a box and its buffer differ, got {box} and {memory.name} of {memory.shape} {memory.dtype}")


class Hopper:
    """`language.nvidia.hopper`."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.mbarrier, self.tma = machine, MBarriers(machine), TMA(machine)

    def fence_async_shared(self, cluster: bool = False) -> Iterator[None]:
        yield
        self.machine.order.fenced |= self.machine.order.seen

    def warpgroup_mma_init(self, value: Tensor) -> Accumulator:
        return Accumulator(value)

    def warpgroup_mma(
        self,
        a: Any,
        b: Memory,
        acc: Any,
        *,
        use_acc: Any = True,
        precision: Any = None,
        max_num_imprecise_acc: Any = None,
        is_async: bool = False,
    ) -> Generator[None, None, Any]:
        """`a @ b + acc` in fp32, computed at the wait: `Machine.access` makes sure that the operands in shared memory do not change."""
        yield
        if a.dtype != b.dtype:
            raise EmulationError(f"the operands of a product have two dtypes, got {a.dtype} and {b.dtype}")
        events = [self.machine.access(x, "product", asynchronous=True) for x in (a, b) if isinstance(x, Memory)]
        result = Accumulator()

        def finish() -> None:
            left = a.data if isinstance(a, Memory) else a
            product = left.float() @ b.data.float()
            result.value = product + (acc.value if isinstance(acc, Accumulator) else acc) if use_acc else product

        self.machine.current.products.append(Transfer(finish, Order(sum(events))))
        return result if is_async else (yield from self.warpgroup_mma_wait(0, [result]))

    def warpgroup_mma_wait(self, num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Generator[None, None, Any]:
        yield
        self.machine.current.retire(self.machine.current.products, num_outstanding)
        values = tuple(x.value if isinstance(x, Accumulator) and x.value is not None else x for x in deps)
        return values[0] if len(values) == 1 else values


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        extent = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
        return Pointer(value.as_strided((extent,), (1,)))
    return Descriptor(value) if hasattr(value, "block_shape") else value


def _modules(machine: Machine, grid: tuple[int, ...], program: tuple[int, ...]) -> dict[str, Any]:
    """What takes the place of Gluon's modules, for `Translator`."""
    hopper = Hopper(machine)
    operations = {
        "allocate_shared_memory": machine.allocate,
        "warp_specialize": machine.specialize,
        "program_id": lambda axis: program[axis],
        "num_programs": lambda axis: grid[axis],
    }
    modules = {"hopper": hopper, "mbarrier": hopper.mbarrier, "tma": hopper.tma}
    return modules | {"nvidia": SimpleNamespace(hopper=hopper), "language": SimpleNamespace(**FUNCTIONS, **operations)}


def run(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], *, seed: int = 0, edits: Mapping[str, str] | None = None) -> None:
    """Run every program of the grid, one after another.

    Args:
        kernel: A function decorated with `gluon.jit`.
        grid: Number of programs along each axis.
        arguments: By name, as for a launch: tensors on the CPU, into which the kernel may write, TMA descriptors, numbers, constants.
        seed: Of the order in which partitions run and loads land.
        edits: Replacements of text in the functions of the kernel, to test that an error is found; each must apply exactly once.

    Raises:
        Race: Two accesses to shared memory conflict and are not ordered, or not by a fence where they need one.
        Deadlock: No partition can run; the message says what each one waits for.
        EmulationError: The base class of both; also raised by itself, as for an accumulator that is used before its wait.
        ValueError: An edit applies nowhere or more than once.
    """
    rng, parameters = random.Random(seed), inspect.signature(kernel.fn).parameters
    arguments = {name: value for name, value in arguments.items() if name in parameters or name not in LAUNCH_OPTIONS}
    for program in itertools.product(*map(range, grid)):
        machine = Machine(rng)
        translator = Translator(_modules(machine, grid, program), edits or {})
        values = {name: _argument(translator.value(value)) for name, value in arguments.items()}
        machine.run(steps(translator.function(kernel.fn), **values))
        if any(count != 1 for count in translator.edited.values()):
            raise ValueError(f"each edit must apply exactly once, got {translator.edited}")
