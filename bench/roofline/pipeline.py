"""One multiprocessor of sm_90 that runs an attention loop: a simulation of events, which finds the steady state.

Each *consumer* of the warp-specialised kernel goes through the steps of its loop (`bench/roofline/loops.py`). They share

- the tensor cores, which compute one product at a time, in the order in which they were issued;
- the schedulers: issue slots, the pipe of half rate and the exponential unit, each divided fairly among those that need it;
- L2, which delivers a number of bytes a clock, one load after another.

A producer loads blocks into `stages` buffers as consumers release them, keys one block ahead of values.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from bench.roofline.loops import Step

L2_BYTES = 24.0  # assumed, a multiprocessor and clock: 5.6 TB/s over 132 at 1.75 GHz
LOAD_LATENCY = 600  # cycles from a load to its data, beside those of its bytes; assumed, as the next
STORE_LATENCY = 700

Moment = Callable[[], float]  # when an actor goes on; infinity as long as nobody knows
Actor = Iterator[Moment | tuple[float, ...]]  # what it waits for, or cycles of issue, half rate, exponentials


@dataclass(frozen=True)
class Schedule:
    """What a multiprocessor runs."""

    loop: tuple[Step, ...]  # for one block of keys
    consumers: int
    stages: int  # buffers of keys, and of values
    block_bytes: float  # of keys and values of a block
    query_bytes: float = 0  # of a consumer
    finish: float = 0  # instructions of a warp after a tile
    l2: float = L2_BYTES  # bytes a clock

    def cycles(self, blocks: int, tiles: int) -> float:
        """For `tiles` tiles of every consumer, with `blocks` blocks of keys each.

        Raises:
            RuntimeError: every actor waits for another.
        """
        return _Run(self, blocks, tiles).cycles()

    def block(self) -> float:
        """Cycles between one block of keys of every consumer and the next, in the steady state."""
        return (self.cycles(60, 1) - self.cycles(20, 1)) / 40

    def call(self, blocks: int, tiles: int) -> float:
        """Cycles for many tiles: those after the fourth take as long as the third and fourth."""
        if tiles <= 4:
            return self.cycles(blocks, tiles)
        two, four = self.cycles(blocks, 2), self.cycles(blocks, 4)
        return four + (tiles - 4) * (four - two) / 2


@dataclass
class _Run:
    schedule: Schedule
    blocks: int
    tiles: int
    now: float = 0
    matrix_free: float = 0  # when the tensor cores have nothing left to do
    l2_free: float = 0
    events: defaultdict[tuple[object, ...], list[float]] = field(default_factory=lambda: defaultdict(list))  # when each happens

    def cycles(self) -> float:
        self._happens("turn", 0)
        consumers = [self._consumer(part) for part in range(self.schedule.consumers)]
        waiting: dict[Actor, Moment] = dict.fromkeys([*consumers, self._producer()], lambda: 0)
        working: dict[Actor, tuple[float, ...]] = {}
        while waiting or working:
            for actor in [actor for actor, moment in waiting.items() if moment() <= self.now]:
                del waiting[actor]
                wish = next(actor, None)
                if callable(wish):
                    waiting[actor] = wish
                elif wish and any(wish):
                    working[actor] = wish
                elif wish:
                    waiting[actor] = lambda: 0
            moments = [moment() for moment in waiting.values()]
            if min(moments, default=inf) <= self.now:
                continue
            rates = fair_rates(working)
            left = min([*moments, *(self.now + max(work) / rates[actor] for actor, work in working.items())], default=self.now) - self.now
            if left == inf:
                raise RuntimeError(f"every actor waits for another, at cycle {self.now:.0f}")
            self.now += left
            for actor, work in list(working.items()):
                share = 1 - left * rates[actor] / max(work)
                working[actor] = tuple(share * part for part in work)
                if share * max(work) < 1e-6:
                    waiting[actor] = lambda: 0
                    del working[actor]
        return self.now

    def _consumer(self, part: int) -> Actor:
        loop = self.schedule.loop
        scores, values = (step for step in loop if step.action == "product")
        first, second = (i for i, step in enumerate(loop) if step.action == "wait")
        softmax = loop[first + 1 : second]
        before = (Step("acquire", name="k"), scores, Step("wait", (0,)), *softmax)
        after = (Step("acquire", name="v"), values, Step("wait", (0,)), Step("release", name="v"))
        acquired = Counter[str]()
        for tile in range(self.tiles):
            yield self._when(tile, ("q", part))
            for steps in (before, *[loop] * (self.blocks - 1), after):
                yield from self._steps(steps, part, acquired, (tile + 1) * self.blocks)
            yield (self.schedule.finish, 0, 0)
            yield self._after(STORE_LATENCY)
            self._happens("q empty", part)

    def _steps(self, steps: Sequence[Step], part: int, acquired: Counter[str], end: int) -> Actor:
        """Go through steps once; blocks from `end` on are those of the next tile."""
        flying = self.events["product", part]
        for action, amounts, name in steps:
            if action == "run":
                yield amounts[:3]
                yield self._after(amounts[3])
            elif action == "product":
                self.matrix_free = max(self.now, self.matrix_free) + amounts[0]
                flying.append(self.matrix_free)
            elif action == "wait":
                yield self._after(flying[-1 - int(amounts[0])] - self.now)
            elif action == "acquire" and acquired[name] < (end if name == "k" else inf):
                yield self._when(acquired[name], (name, part) if name == "turn" else (name,))
                acquired[name] += 1
            elif action == "release" and name == "turn":
                self._happens("turn", (part + 1) % self.schedule.consumers)
            elif action == "release":
                self._happens(f"{name} empty", part)

    def _producer(self) -> Actor:
        for tile in range(self.tiles):
            first, end = tile * self.blocks, (tile + 1) * self.blocks
            yield from self._deliver("k", first)
            for n in range(first, end):
                if n + 1 < end:
                    yield from self._deliver("k", n + 1)
                yield from self._deliver("v", n)
                if n == first:
                    yield from self._deliver_queries(tile)

    def _deliver_queries(self, tile: int) -> Actor:
        for part in range(self.schedule.consumers):
            if tile:
                yield self._when(tile - 1, ("q empty", part))
            self._happens("q", part, at=self._load(self.schedule.query_bytes))

    def _deliver(self, name: str, n: int) -> Actor:
        """Load keys or values as soon as all consumers have released the buffer."""
        if n >= self.schedule.stages:
            yield self._when(n - self.schedule.stages, *((f"{name} empty", part) for part in range(self.schedule.consumers)))
        self._happens(name, at=self._load(self.schedule.block_bytes / 2))

    def _load(self, size: float) -> float:
        """When a load that is issued now has arrived."""
        self.l2_free = max(self.now, self.l2_free) + size / self.schedule.l2
        return self.l2_free + LOAD_LATENCY

    def _happens(self, *event: object, at: float | None = None) -> None:
        self.events[event].append(self.now if at is None else at)

    def _when(self, n: int, *events: tuple[object, ...]) -> Moment:
        """When all of these events have happened `n` times, and once more."""
        times = [self.events[event] for event in events]
        return lambda: max(found[n] if n < len(found) else inf for found in times)

    def _after(self, cycles: float) -> Moment:
        moment = self.now + cycles
        return lambda: moment


def fair_rates(working: Mapping[Actor, tuple[float, ...]]) -> dict[Actor, float]:
    """How fast each goes, 1 being its speed alone: all alike, until something is used up by those that need it."""
    use = {actor: [part / max(work) for part in work] for actor, work in working.items()}
    rates, growing, free = dict.fromkeys(use, 0.0), list(use), [1.0, 1.0, 1.0]
    while growing:
        sums = [sum(use[actor][i] for actor in growing) for i in range(3)]
        more = min([1 - max(rates[actor] for actor in growing), *(f / s for f, s in zip(free, sums, strict=True) if s)])
        free = [f - more * s for f, s in zip(free, sums, strict=True)]
        for actor in growing:
            rates[actor] += more
        growing = [a for a in growing if rates[a] < 1 - 1e-12 and not any(f < 1e-12 and u for f, u in zip(free, use[a], strict=True))]
    return rates
