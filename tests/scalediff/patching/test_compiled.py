"""torch.compile around a patch: the whole model, in place or its blocks, patched before or after, one size or several.

A compiled model computes the patched result while it is patched, and the plain one after.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import scalediff
from bench.models.zoo import ZOO, Specimen
from tests.scalediff.patching.test_composition import ROOT, assert_close, assert_differs, patch

pytest.importorskip("diffusers", reason="what is compiled are diffusers' models")

pytestmark = pytest.mark.filterwarnings("error:scalediff")  # no warning of ours in any of these tests

SMALL: dict[str, dict[str, Any]] = {  # compiling takes long
    "SD1.5": {"block_out_channels": (32, 32), "mid_block_type": None, "up_block_types": ("UpBlock2D", "UpBlock2D")},
    "FLUX.1": {"num_single_layers": 0},
    "SD3": {"num_layers": 1, "dual_attention_layers": ()},
    "Lumina 2": {"num_layers": 1},
}
COMPILED_GRID = (8, 3)
COMPILERS: dict[str, Callable[..., Any]] = {
    "wrapped": torch.compile,
    "in place": lambda model, **how: model.compile(**how),
    "blocks": lambda model, **how: model.compile_repeated_blocks(**how),  # SD3 and Lumina 2 name none
}
QUICK = [  # "eager" runs the traced graph; "aot_eager" also its functional form, which takes twice as long to compile
    ("FLUX.1", "wrapped", "before", "eager"),
    ("FLUX.1", "wrapped", "after, by the wrapper", "eager"),
    ("FLUX.1", "in place", "after", "eager"),
    ("FLUX.1", "blocks", "before", "eager"),
    ("SD1.5", "blocks", "after", "eager"),
]
SLOW = [
    *[(*case[:3], "aot_eager") for case in QUICK if case[3] == "eager"],
    ("FLUX.1", "wrapped", "after", "aot_eager"),
    ("FLUX.1", "in place", "before", "aot_eager"),
    ("FLUX.1", "blocks", "after", "aot_eager"),
    ("SD1.5", "wrapped", "before", "aot_eager"),
    ("SD1.5", "in place", "after", "aot_eager"),
    ("SD1.5", "blocks", "before", "aot_eager"),
    ("SD3", "wrapped", "after, by the wrapper", "aot_eager"),
    ("SD3", "in place", "before", "aot_eager"),
    ("Lumina 2", "wrapped", "before", "aot_eager"),
]


def quick_and_slow(quick: list[Any], slow: list[Any]) -> list[Any]:
    return [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


def small(name: str) -> Specimen:
    return replace(ZOO[name], config=ZOO[name].config | SMALL[name])


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.composes("torch.compile", "network")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("name", "compiler", "patched_when", "backend"), quick_and_slow(QUICK, SLOW))
def test_a_compiled_model_is_patched_and_unpatched(name: str, compiler: str, patched_when: str, backend: str) -> None:
    spec = small(name)
    model = spec.build()
    plain = spec.run(model, COMPILED_GRID)
    with patch(model):
        patched = spec.run(model, COMPILED_GRID)
    assert_differs(patched, plain)
    if patched_when == "before":
        patch(model)
    whole = name != "Lumina 2"  # whose own forward reads the lengths of the prompts between two graphs
    wrapper = COMPILERS[compiler](model, fullgraph=whole, backend=backend, dynamic=False)
    called = model if wrapper is None else wrapper
    if patched_when != "before":
        patch(called if patched_when == "after, by the wrapper" else model)
    assert_close(spec.run(called, COMPILED_GRID), patched)
    scalediff.unpatch_model(called)
    assert_close(spec.run(called, COMPILED_GRID), plain)


@pytest.mark.slow
def test_the_first_pass_of_a_process_may_be_a_compiled_one() -> None:
    """Two steps of a U-Net of one level, whose cross-attention passes through, with nothing run before."""
    one_level = {name: SMALL["SD1.5"][name][:1] for name in ("block_out_channels", "up_block_types")}
    one_level |= {"mid_block_type": None, "down_block_types": ("CrossAttnDownBlock2D",)}
    code = (
        "import torch, scalediff; from dataclasses import replace; from bench.models.zoo import ZOO; "
        f"spec = replace(ZOO['SD1.5'], config=ZOO['SD1.5'].config | {one_level}); model = spec.build(); scalediff.patch_model(model); "
        "compiled = torch.compile(model, fullgraph=True, backend='eager'); "
        "outs = [spec.run(compiled, (6, 5)) for _ in range(2)]; plain = spec.run(model, (6, 5)); "
        "print(all(torch.allclose(out, plain, rtol=1e-4, atol=1e-5) for out in outs))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["True"], done.stderr


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_graph_serves_the_next_patch() -> None:
    spec = small("FLUX.1")
    model = spec.build()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    for _ in range(torch._dynamo.config.recompile_limit + 1):
        with patch(model):
            spec.run(compiled, COMPILED_GRID)
        spec.run(compiled, COMPILED_GRID)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises inside after seconds of the processor's time: a compiler lost in symbols does not come back."""

    def over(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("name", "dynamic", "backend"),
    quick_and_slow(
        [("FLUX.1", None, "eager")],
        [
            *[("FLUX.1", True, "eager"), ("SD1.5", None, "eager"), ("FLUX.1", None, "aot_eager")],
            *[("FLUX.1", True, "aot_eager"), ("SD1.5", None, "aot_eager")],
        ],
    ),
)
def test_a_compiled_model_takes_sizes_that_are_symbols_to_the_compiler(name: str, dynamic: bool | None, backend: str) -> None:
    spec = small(name)
    model = spec.build()
    with patch(model), at_most(60):
        compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
        for grid in ((5, 6),) if dynamic else (COMPILED_GRID, (5, 6)):
            assert_close(spec.run(compiled, grid), spec.run(model, grid))
