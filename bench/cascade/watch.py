"""Where the time of a run goes: a watch over the parts of a pipeline while it draws.

Stage by stage it times every step and the passes of the denoiser in it, the autoencoder's encoding and decoding, latent frequency mixing
and structure guidance. The first step of a stage is left out, because it pays what is paid once. In the last step, left out as well, the
attention calls of the denoiser are timed one by one: their share of that step's passes is applied to the median step, so that a slow step
is not taken for slow attention. A GPU is timed by events, without waiting in between.
"""

from __future__ import annotations

import functools
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from bench.cascade import authors as cascade_authors
from scalediff.cascade import schedule
from scalediff.cascade import stage as cascade
from scalediff.patching import call
from scalediff.patching.networks import denoiser_of
from scalediff_kernels.neighborhood import windowed_sdpa


class Clock:
    """Marks in time: events in a GPU's stream, the host's clock on a CPU. Call `wait` before asking for the seconds between two."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        return float(first.elapsed_time(last)) / 1000 if self._cuda else last - first

    def wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], Any]) -> float:
        self.wait()
        begin = self.mark()
        call()
        end = self.mark()
        self.wait()
        return self.seconds(begin, end)


class Memory:
    """Bytes in use now, and at most since the last `reset`: allocated by torch on a GPU, the process's resident set on a CPU.

    None where the system does not report it: outside Linux, or where its peak cannot be reset.
    """

    def __init__(self, device: str) -> None:
        self._cuda, self._known = device == "cuda", True

    def reset(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._known = False

    def now(self) -> int | None:
        return torch.cuda.memory_allocated() if self._cuda else self._resident("VmRSS")

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self._cuda else self._resident("VmHWM")

    def _resident(self, name: str) -> int | None:
        found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE) if self._known else None
        return 1024 * int(found[1]) if found else None


class StageTimes(NamedTuple):
    """Seconds of the parts of one watched stage.

    `attention` is of the image to itself, and to and of text in one softmax, `cross` to text; both are of the median step, and missing
    inside compiled graphs, where nothing sees them. `rest` is what comes before the first step and after the last.
    """

    each: dict[str, list[float]]  # of every timed step: step, and in it denoiser, guidance, attention, cross
    once: dict[str, float]  # of the stage: encode, decode, mixing, rest
    peak: int | None  # bytes
    backends: str  # what computed its attention calls


def composed(stages: Sequence[StageTimes], steps: Sequence[int]) -> float:
    """Seconds of a run with this many steps in each stage."""
    return sum(n * statistics.median(stage.each["step"]) + sum(stage.once.values()) for stage, n in zip(stages, steps, strict=True))


class Watch:
    """Watches one run of a pipeline in which every stage has the same number of `steps`, the first and the last of them not timed.

    With `deep`, attention calls are timed in the last step. Raises ValueError if there are fewer than 3 steps.
    """

    def __init__(self, clock: Clock, memory: Memory, *, steps: int, deep: bool = True) -> None:
        if steps < 3:
            raise ValueError(f"a watched stage needs at least 3 steps, its first and last are not timed, got {steps=}")
        self._clock, self._memory, self._steps, self._deep = clock, memory, steps, deep
        self._inside: list[tuple[str, Any]] = []  # parts under way, the outermost first, and when they began
        self.stages: list[StageTimes] = []  # that have ended

    def begin(self) -> None:
        self._clock.wait()
        self._memory.reset()
        self._begun, self._marks, self._backends = self._clock.mark(), list[Any](), list[str]()  # when it began and its steps ended
        self._spans = defaultdict[tuple[str, int], list[tuple[Any, Any]]](list)  # by part and step

    def on_step(self, pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        """For diffusers' `callback_on_step_end`."""
        self._marks.append(self._clock.mark())
        return {}

    def on_stage(self, stage: Any) -> None:
        """A stage has ended, and the next one begins; raises RuntimeError if it had another number of steps."""
        end = self._clock.mark()
        self._clock.wait()
        if len(self._marks) != self._steps:
            raise RuntimeError(f"every stage must run {self._steps} steps, got {len(self._marks)}")
        self.stages.append(self._times(end))
        self.begin()

    @contextmanager
    def over(self, pipe: Any) -> Iterator[None]:
        """The first stage begins, and what the pipeline calls inside is timed; afterwards it is as it was."""
        denoiser = denoiser_of(pipe)
        parts = [(cascade, "mix_frequencies", "mixing"), (schedule, "_guided", "guidance")]
        parts += [(pipe.vae, name, name) for name in ("encode", "decode")]
        replaced: list[tuple[Any, str, Any]] = [(owner, name, functools.partial(self._timed, part)) for owner, name, part in parts]
        if self._deep:
            attention = [(F, "scaled_dot_product_attention"), (windowed_sdpa, "_sdpa"), (cascade_authors, "_sdpa")]
            replaced += [(owner, name, self._attention) for owner, name in attention] + [(call.Call, "attend", self._windows)]
        with ExitStack() as undo:
            undo.callback(denoiser.register_forward_pre_hook(lambda *_: self._enter("denoiser")).remove)
            undo.callback(denoiser.register_forward_hook(lambda *_: self._leave()).remove)
            for owner, name, timed in replaced:
                undo.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
            self.begin()
            yield

    def _enter(self, name: str) -> None:
        self._inside.append((name, self._clock.mark()))

    def _leave(self) -> None:
        name, begin = self._inside.pop()
        self._spans[name, len(self._marks)].append((begin, self._clock.mark()))

    def _wanted(self, name: str) -> bool:
        """Parts that are not within each other; attention only in the denoiser and in the last step."""
        inside = [part for part, _ in self._inside]
        if name in ("attention", "cross"):
            return inside == ["denoiser"] and len(self._marks) == self._steps - 1
        return not inside

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._wanted(name):
                return function(*args, **kwargs)
            self._enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        return call

    def _attention(self, sdpa: Callable[..., Any]) -> Callable[..., Any]:
        """In place of torch's attention: queries and keys of one length are the image's own, or joint."""
        own, cross = self._timed("attention", sdpa), self._timed("cross", sdpa)

        @functools.wraps(sdpa)
        def call(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            same = query.shape[-2] == key.shape[-2]
            if (same and self._wanted("attention")) or (self._inside and self._inside[-1][0] == "attention"):
                backend = SDPBackend(torch._fused_sdp_choice(query, key, value, *args, **kwargs))  # that torch chooses
                self._backends.append(backend.name.lower().removesuffix("_attention"))
            return (own if same else cross)(query, key, value, *args, **kwargs)

        return call

    def _windows(self, attend: Callable[..., Any]) -> Callable[..., Any]:
        """In place of an attention call in windows: computed by the kernel if torch's attention is not called."""
        timed = self._timed("attention", attend)

        @functools.wraps(attend)
        def call(*args: Any, **kwargs: Any) -> Any:
            wanted, before = self._wanted("attention"), len(self._backends)
            result = timed(*args, **kwargs)
            if wanted and len(self._backends) == before:
                self._backends.append("triton")
            return result

        return call

    def _times(self, end: Any) -> StageTimes:
        seconds, timed, last = self._clock.seconds, range(1, self._steps - 1), self._steps - 1

        def total(name: str, *steps: int) -> float:
            return sum(seconds(*span) for step in steps for span in self._spans[name, step])

        each = {"step": [seconds(self._marks[i - 1], self._marks[i]) for i in timed]}
        each |= {name: [total(name, i) for i in timed] for name in ("denoiser", "guidance")}
        if self._deep:
            scale = statistics.median(each["denoiser"]) / total("denoiser", last)
            each |= {name: [scale * total(name, last)] for name in ("attention", "cross")}
        once = {name: total(name, *range(self._steps + 1)) for name in ("encode", "decode", "mixing")}
        in_steps = seconds(self._spans["denoiser", 0][0][0], self._marks[-1])
        once["rest"] = max(0.0, seconds(self._begun, end) - in_steps - sum(once.values()))
        return StageTimes(each, once, self._memory.peak(), " ".join(sorted(set(self._backends))))
