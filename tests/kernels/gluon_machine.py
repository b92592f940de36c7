"""The machine that `gluon_emulator` runs on: shared memory, barriers, and partitions that take turns.

Every access to shared memory is an event, and every partition and every barrier knows which events have happened before (`Order`). An
access that conflicts with another one and is not ordered after it is an error, even where this schedule gives the right values.
"""

from __future__ import annotations

import functools
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.kernels.gluon_language import EmulationError, steps


class Race(EmulationError):
    """Two accesses to the same shared memory are in no order, or in none that the asynchronous proxy sees."""


class Deadlock(EmulationError):
    """No partition can go on."""


def kernel_line() -> str:
    """The line of the kernel that runs, as "file:line"."""
    frame = sys._getframe(1)
    while "_steps" not in frame.f_globals:  # only translated functions have it
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


@dataclass
class Order:
    """The events known to have happened, one bit for each; a fence orders those in `fenced` before asynchronous accesses."""

    seen: int = 0
    fenced: int = 0

    def join(self, other: Order) -> None:
        self.seen |= other.seen
        self.fenced |= other.fenced


@dataclass
class Access:
    """An access to shared memory. Products and TMA transfers are asynchronous: only a partition that waits for one knows its event."""

    event: int
    elements: int  # of the allocation, one bit for each
    write: bool
    asynchronous: bool
    what: str


@dataclass
class Allocation:
    elements: Tensor
    name: str = "shared memory"
    accesses: list[Access] = field(default_factory=list)
    barriers: dict[int, Barrier] = field(default_factory=dict)


@dataclass
class Barrier:
    """An mbarrier: the current phase completes when no arrivals and no bytes are pending."""

    memory: Memory
    count: int
    initialised: int  # the event
    pending_arrivals: int
    pending_bytes: int = 0
    phase: int = 0
    phases_awaited: int = 0
    arrived: Order = field(default_factory=Order)
    completed: Order = field(default_factory=Order)  # `arrived` when the last complete phase completed

    def has_passed(self, parity: int) -> bool:
        return (self.phase - 1) % 2 == parity

    def arrive(self, count: int, nbytes: int, order: Order) -> None:
        """Count arrivals, and bytes: those that are expected, and negative those that have landed."""
        if count > self.pending_arrivals:
            raise EmulationError(f"too many arrivals at {self}, got {count=}")
        self.pending_arrivals -= count
        self.pending_bytes += nbytes
        self.arrived.join(order)
        if self.pending_arrivals or self.pending_bytes:
            return
        if self.phases_awaited < self.phase:
            raise EmulationError(f"{self.memory.name} completes phase {self.phase} before anyone has waited for phase {self.phase - 1}")
        self.phase, self.pending_arrivals = self.phase + 1, self.count
        self.completed.join(self.arrived)

    def __str__(self) -> str:
        pending = f"{self.pending_arrivals} of {self.count} arrivals and {self.pending_bytes} bytes pending"
        return f"{self.memory.name}: phase {self.phase}, {pending}"


@functools.cache
def _elements(shape: torch.Size, strides: tuple[int, ...], offset: int) -> int:
    """The elements of an allocation that a view covers, one bit for each."""
    end = offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    covered = torch.zeros(end, dtype=torch.uint8)
    covered.as_strided(shape, strides, offset).fill_(1)
    return int.from_bytes(np.packbits(covered.numpy(), bitorder="little").tobytes(), "little")


class Memory:
    """A shared memory descriptor: a view of an allocation."""

    layout = None

    def __init__(self, machine: Machine, allocation: Allocation, data: Tensor, part: str = "") -> None:
        self.machine, self.allocation, self.data, self.part = machine, allocation, data, part
        self.shape, self.dtype = list(data.shape), data.dtype

    @property
    def name(self) -> str:
        return self.allocation.name + self.part

    def assigned_to(self, variable: str) -> None:
        """An allocation takes the name of its variable."""
        if self.data is self.allocation.elements:
            self.allocation.name = variable

    def _view(self, data: Tensor, part: str = "") -> Memory:
        return Memory(self.machine, self.allocation, data, self.part + part)

    def index(self, index: int) -> Memory:
        if not 0 <= index < self.shape[0]:
            raise EmulationError(f"{self.name} has {self.shape[0]} buffers, got index {index}")
        return self._view(self.data[index], f"[{index}]")

    def slice(self, start: int, length: int, dim: int = 0) -> Memory:
        return self._view(self.data.narrow(dim, start, length), f"[{start}:{start + length}]")

    def reshape(self, shape: Sequence[int]) -> Memory:
        return self._view(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> Memory:
        return self._view(self.data.permute(*order))

    def load(self, layout: Any = None) -> Generator[None, None, Tensor]:
        yield
        self.machine.order.seen |= self.machine.access(self, "load")
        return self.data.clone()

    def store(self, value: Tensor) -> Iterator[None]:
        yield
        if (list(value.shape), value.dtype) != (self.shape, self.dtype):
            raise EmulationError(f"{self.name} holds {self.shape} {self.dtype}, got {list(value.shape)} {value.dtype}")
        self.machine.order.seen |= self.machine.access(self, "store", write=True)
        self.data.copy_(value)

    def _keep_alive(self) -> None:
        pass


@dataclass
class Transfer:
    """An asynchronous operation in flight: how it ends, and the events known to a partition that waits for it."""

    finish: Callable[[], None]
    order: Order
    speed: float = 1


@dataclass(eq=False)
class Partition:
    """A partition of a warp-specialised kernel, or the kernel outside `gl.warp_specialize`; others may run where `steps` yields."""

    name: str
    steps: Generator[None, None, Any]
    order: Order
    speed: float = 1
    awaited: tuple[Barrier, int, str] | None = None  # with the parity and the line of the kernel
    ended: bool = False
    result: Any = None
    products: deque[Transfer] = field(default_factory=deque)
    stores: deque[Transfer] = field(default_factory=deque)

    @property
    def ready(self) -> bool:
        return self.awaited is None or self.awaited[0].has_passed(self.awaited[1])

    def step(self) -> None:
        try:
            next(self.steps)
        except StopIteration as stop:
            if self.products or self.stores:
                unfinished = f"{len(self.products)} products and {len(self.stores)} TMA stores in flight"
                raise EmulationError(f"{self.name} ends with {unfinished}") from None
            self.ended, self.result = True, stop.value

    def retire(self, transfers: deque[Transfer], most: int) -> None:
        """Finish the oldest transfers until `most` are in flight."""
        while len(transfers) > most:
            transfer = transfers.popleft()
            transfer.finish()
            self.order.join(transfer.order)

    def __str__(self) -> str:
        if self.awaited is None:
            return f"{self.name} has ended"
        barrier, parity, line = self.awaited
        return f"{self.name} waits at {line} for parity {parity} of {barrier}"


class Machine:
    """One program of the grid: the scheduler of its partitions, its shared memory and the order of events."""

    main: Partition
    current: Partition

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.events = rng, 0
        self.allocations, self.in_flight, self.loads = list[Allocation](), list[Transfer](), list[tuple[int, str]]()
        self.load_speed = self._speed()

    @property
    def order(self) -> Order:
        return self.current.order

    def _speed(self) -> float:
        """Weight in the scheduler's choice; drawn, so that partitions run far ahead of each other in some schedules."""
        return float(2 ** self.rng.uniform(-4, 4))

    def event(self) -> int:
        self.events += 1
        return 1 << self.events

    def access(self, memory: Memory, what: str, *, write: bool = False, asynchronous: bool = False) -> int:
        """Record an access by the current partition, and check its order against those that it conflicts with."""
        allocation, order, kept = memory.allocation, self.order, list[Access]()
        elements = _elements(memory.data.shape, memory.data.stride(), memory.data.storage_offset())
        new = Access(self.event(), elements, write, asynchronous, f"{what} of {memory.name} by {self.current.name} at {kernel_line()}")
        for old in allocation.accesses:
            shared = old.elements & elements
            if shared and (write or old.write):
                if not order.seen & old.event:
                    raise Race(f"{new.what} is not ordered after {old.what}")
                # Of the ordinary accesses before an asynchronous one, writes alone need a fence; after a read, a barrier suffices.
                if asynchronous and old.write and not old.asynchronous and not order.fenced & old.event:
                    raise Race(f"{new.what} needs a fence_async_shared after {old.what}")
            replaced = order.seen & old.event and (write or not old.write) and shared == old.elements
            if not replaced:
                kept.append(old)
        allocation.accesses = [*kept, new]
        return new.event

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any = None, value: Any = None) -> Generator[None, None, Memory]:
        """`gl.allocate_shared_memory`; what is not yet written is NaN."""
        elements = torch.full(list(shape), float("nan") if dtype.is_floating_point else 0, dtype=dtype)
        self.allocations.append(Allocation(elements))
        memory = Memory(self, self.allocations[-1], elements)
        if value is not None:
            yield from memory.store(value)
        return memory

    def barrier(self, memory: Memory) -> Barrier:
        barrier = memory.allocation.barriers.get(memory.data.storage_offset())
        if barrier is None or not self.order.seen & barrier.initialised:
            raise EmulationError(f"{memory.name} is used before mbarrier.init")
        return barrier

    def wait(self, barrier: Barrier, parity: int) -> Iterator[None]:
        """Wait until the phase before the barrier's current one has this parity; then what happened before it completed is known."""
        partition = self.current
        partition.awaited = barrier, parity, kernel_line()
        yield
        partition.awaited = None
        partition.order.join(barrier.completed)
        barrier.phases_awaited = barrier.phase

    def run(self, kernel: Generator[None, None, Any]) -> None:
        """Run the kernel; at its end every load must have been waited for, and no bytes be expected."""
        self.main = Partition("the kernel", kernel, Order(), self._speed())
        self._drive([self.main])
        lost = [load for event, load in self.loads if not self.main.order.seen & event]
        if lost:
            raise EmulationError(f"nobody waited for {lost[0]}")
        for barrier in (barrier for allocation in self.allocations for barrier in allocation.barriers.values()):
            if barrier.pending_bytes:
                raise EmulationError(f"at the end of the kernel bytes are expected at {barrier}")

    def specialize(self, functions_and_args: Any, worker_num_warps: Sequence[int], worker_num_regs: Sequence[int] | None = None) -> Any:
        """`gl.warp_specialize`: run the partitions to their ends; the result is that of the first one."""
        workers = len(functions_and_args) - 1
        if len(worker_num_warps) != workers or (worker_num_regs is not None and len(worker_num_regs) != workers):
            raise EmulationError(f"warp_specialize has {workers} workers, got {worker_num_warps=} and {worker_num_regs=}")
        if self.current is not self.main:
            raise EmulationError(f"warp_specialize cannot be nested, got a call in {self.current.name}")
        partitions = [
            Partition(f"partition {i} ({function.__name__})", steps(function, *args), replace(self.order), self._speed())
            for i, (function, args) in enumerate(functions_and_args)
        ]
        self._drive(partitions)
        self.current = self.main
        for partition in partitions:
            self.order.join(partition.order)
        return partitions[0].result

    def _drive(self, partitions: list[Partition]) -> None:
        """Run partitions to their ends: again and again a step of one that is ready, or the landing of a load."""
        while running := [partition for partition in partitions if not partition.ended]:
            choices = [partition for partition in running if partition.ready] + self.in_flight
            if not choices:
                raise Deadlock("deadlock, and no load is in flight\n" + "\n".join(map(str, partitions)))
            chosen = self.rng.choices(choices, [choice.speed for choice in choices])[0]
            if isinstance(chosen, Partition):
                self.current = chosen
                chosen.step()
            else:
                self.in_flight.remove(chosen)
                chosen.finish()
