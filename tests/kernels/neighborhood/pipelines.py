"""Problems for the warp-specialised kernel, and its launches in the Gluon emulator."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalediff_kernels.testing import assert_within_budget, poisoned_memory
from tests.kernels.gluon_emulator import run as emulate
from tests.kernels.neighborhood.problems import Problem, expected

F16, BF16 = torch.float16, torch.bfloat16
CHOSEN = [
    Problem((16, 32), (16, 16), (8, 16), (0, 0), 16, dtype=F16),  # boxes tile everything
    Problem((24, 20), (16, 20), (8, 16), (3, 5), 40, heads=2, groups=1, dtype=BF16),  # tiles cut by the border and by the offset
    Problem((17, 23), (11, 19), (11, 13), (4, 7), 24, heads=1, groups=1, dtype=F16),  # boxes that overlap
    Problem((8, 200), (4, 96), (2, 64), (1, 33), 16, heads=1, groups=1, dtype=F16),  # a tile of two consumers side by side
    Problem((16, 16), (64, 64), (32, 32), (5, 9), 16, heads=1, groups=1, dtype=F16),  # window and patch larger than the grid
    Problem((16, 32), (16, 16), (8, 16), (0, 0), 64, heads=1, groups=1, text=140, rope=True, rule="window", dtype=F16),  # ragged text
    Problem((16, 32), (16, 16), (8, 16), (0, 0), 32, heads=2, groups=1, text=130, rule="global", layout="joint", dtype=BF16),
    Problem((16, 16), (9, 14), (9, 14), (3, 5), 136, heads=1, groups=1, text=40, rope=True, rule="window", scale=-0.2, dtype=F16),
    Problem((16, 24), (12, 16), (8, 16), (0, 0), 80, heads=1, groups=1, text=9, rule="window", scale=0.0, dtype=F16),
    Problem((16, 16), (16, 16), (8, 16), (0, 0), 256, heads=1, groups=1, dtype=BF16),
    Problem((16, 20), (12, 18), (8, 16), (2, 0), 16, batch=2, layout="heads first", dtype=F16),
    Problem((16, 16), (12, 16), (8, 16), (0, 0), 32, text=16, rope=True, rule="global", layout="packed", dtype=F16),
    Problem((16, 16), (13, 16), (8, 16), (0, 8), 16, layout="sequence", dtype=F16),
]


def draw(seed: int) -> Problem:
    """A problem whose patches hold a tile of 128 queries."""
    rng = random.Random(seed)
    axes: list[tuple[int, int, int, int]] = []
    least = rng.choice([(8, 16), (16, 8), (12, 12), (4, 32), (11, 13)])
    for smallest in least:
        length = rng.randint(smallest, smallest + 12)
        patch = rng.randint(smallest, smallest + 4)
        window = rng.randint(patch, patch + 10)
        axes.append((length, window, patch, rng.choice([0, rng.randrange(patch)])))
    groups, text = rng.choice([1, 2]), rng.choice([0, 0, 3, 64, 128, 150])
    return Problem(
        *zip(*axes, strict=True),  # type: ignore[arg-type]
        dim=rng.choice([8, 16, 24, 40, 64, 72]),
        batch=rng.choice([1, 1, 2]),
        heads=groups * rng.choice([1, 2]),
        groups=groups,
        text=text,
        rope=text > 0 and rng.random() < 0.5,
        rule=rng.choice(["window", "global", None]) if text else None,
        scale=rng.choice([None, None, 0.7, -0.4, 0.0]),
        layout=rng.choice(["contiguous", "heads first", "packed", "sequence"]),
        dtype=rng.choice([F16, BF16]),
    )


def launches(problem: Problem, outputs: tuple[Tensor, Tensor | None], **changes: Any) -> list[Any]:
    """The launches of a problem: for the image queries, and for the text queries if there is a rule."""
    from scalediff_kernels.neighborhood.launch import image_launch, text_launch

    q, k, v, *text = problem.inputs()
    tables = problem.tables()
    rope = None if tables is None else (tables[0].contiguous(), tables[1].contiguous())
    how = problem.arguments | {"device": "sm_90", "path": "warp-specialised"} | changes
    found = [image_launch(outputs[0], q, k, v, *(text[1:] or (None, None)), rope, **how)]
    if problem.rule == "global":
        how, rope = how | {"window": problem.grid, "patch": problem.grid, "offset": (0, 0)}, None
    return [*found, text_launch(outputs[1], text[0], k, v, *text[1:], rope, **how)] if problem.rule else found


def run(
    problem: Problem, *, programs: int = 2, seed: int = 0, edits: Mapping[str, str] | None = None, **changes: Any
) -> tuple[Tensor, Tensor | None]:
    """Image and text of the kernel by the emulator, with so many programs at most; `changes` are arguments of the launches."""
    q, _, _, *text = problem.inputs()
    with poisoned_memory():
        outputs = torch.empty(q.shape, dtype=q.dtype), torch.empty(text[0].shape, dtype=q.dtype) if problem.rule else None
        for launch in launches(problem, outputs, **changes):
            emulate(launch.kernel, (min(programs, launch.programs),), launch.arguments, seed=seed, edits=edits)
            if launch.then:
                launch.then.run()
    return outputs


def assert_right(problem: Problem, **how: Any) -> None:
    """The kernel keeps the error budget."""
    results, exacts, eagers = run(problem, **how), expected(problem, exact=True), expected(problem, exact=False)
    for result, exact, plain in zip(results, exacts, eagers, strict=True):
        assert (result is None) == (exact is None)
        if result is not None and exact is not None and plain is not None:
            assert_within_budget(result, plain, exact)


SMALL = Problem((16, 48), (16, 32), (8, 16), (0, 0), 16, heads=1, groups=1, dtype=F16)  # six tiles of four blocks
JOINT = replace(SMALL, text=200, rope=True, rule="window")
