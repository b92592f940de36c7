"""How the patch grid moves from step to step."""

from __future__ import annotations

import random
import weakref

from torch import Tensor

from scalediff.settings import Jitter


class Offsets:
    """The offset of the patch grid, as a fraction of a patch: one offset per step.

    Passes with the same input tensor belong to one step. The conditional and the unconditional pass of a step must use the same grid,
    because guidance would amplify any difference between them.
    """

    def __init__(self, jitter: Jitter, seed: int) -> None:
        self.jitter, self._seed = jitter, seed
        self.restart()

    def restart(self) -> None:
        """Start the sequence of offsets again."""
        self._random = random.Random(self._seed)
        self._last_input: tuple[weakref.ref[Tensor], int] | None = None
        self._fraction = (0.0, 0.0)
        self._steps = 0

    @property
    def place(self) -> str:
        """The place in the sequence, to compare with other ranks."""
        return f"{self.jitter} after {self._steps} steps"

    @property
    def at_start(self) -> bool:
        """Whether no step has had an offset yet."""
        return self._steps == 0

    def next(self, model_input: Tensor) -> tuple[float, float]:
        """The offset `(Y, X)` of a pass with this input."""
        version = 0 if model_input.is_inference() else model_input._version
        last = self._last_input
        if self.jitter != "none" and (last is None or last[0]() is not model_input or last[1] != version):
            self._last_input = weakref.ref(model_input), version
            if self.jitter == "random":
                self._fraction = self._random.random(), self._random.random()
            else:
                self._fraction = (0.5, 0.5) if self._steps % 2 else (0.0, 0.0)
            self._steps += 1
        return self._fraction
