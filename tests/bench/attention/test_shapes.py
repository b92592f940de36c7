"""Shapes of the attention benchmark are those of the models; their work is counted by hand, and memory is estimated from above."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.attention import providers
from bench.attention.compiled import PROVIDERS
from bench.attention.shapes import CPU_SHAPES, QUICK, SHAPES, Shape, Task, tasks, view_starts
from scalediff.methods.views import starts as views_of_the_library
from scalediff_kernels.neighborhood.geometry import attention_bytes
from tests.bench.made_up import ODD


def test_shapes_are_those_of_the_models() -> None:
    grids = {name: (s.grid, s.window, s.patch, s.heads, s.head_dim, s.text) for name, s in SHAPES.items()}
    assert grids["flux-8192"] == ((512, 512), (64, 64), (32, 32), 24, 128, 512)
    assert grids["sdxl-32-2048"] == ((64, 64), (32, 32), (16, 16), 20, 64, 0)
    assert grids["sd15-32-4096"] == ((256, 256), (32, 32), (16, 16), 8, 80, 0)
    assert SHAPES["lumina-next-4096"].key_heads == 8
    assert {name for name, shape in CPU_SHAPES.items() if shape.text} == {"cpu-64-text"}
    assert all(shape.dtype == torch.float32 for shape in CPU_SHAPES.values())
    assert set(QUICK) <= set(SHAPES)
    assert [t.rule for t in tasks(["flux-4096"], None, "cpu")] == ["window", "global"]
    assert [t.dtype for t in tasks(["sdxl-64-2048"], None, "cpu")] == [torch.float16]


def test_work_by_hand() -> None:
    sdxl, flux = (
        Task(name, SHAPES[name], SHAPES[name].dtype, "cpu", rule) for name, rule in (("sdxl-64-4096", ""), ("flux-4096", "window"))
    )
    assert sdxl.flops("window") == 2 * 4 * 64 * 10 * 65536 * 4096
    assert sdxl.flops("full") == 2 * 4 * 64 * 10 * 65536**2
    assert sdxl.flops("views") == 49 * 2 * 4 * 64 * 10 * 4096**2
    assert flux.flops("window") == 4 * 128 * 24 * (65536 * 4608 + 64 * 512 * 4608)
    assert flux.flops("full") == 4 * 128 * 24 * 66048**2
    assert Task("flux-4096", SHAPES["flux-4096"], torch.bfloat16, "cpu", "global").flops("window") == 4 * 128 * 24 * (
        65536 * 4608 + 512 * 66048
    )
    s = SHAPES["sdxl-64-4096"]
    assert sdxl.bytes("full") == attention_bytes(grid=s.grid, heads=s.heads, head_dim=s.head_dim, itemsize=2, batch=2)
    assert sdxl.bytes("views") == 49 * 4 * 2 * 2 * 64 * 10 * 4096
    assert Task("x", ODD, torch.float32, "cpu", "global").bytes("full") == 4 * 16 * (13 * 18 + 9) * (4 + 2 + 2 + 4)


def test_executed_work_by_hand() -> None:
    """Padding is executed and not useful: of the canvas, of blocks, of the kernel's boxes and of the head dim in registers."""
    uhd = Task("flux-uhd", SHAPES["flux-uhd"], torch.bfloat16, "cpu", "global")
    text = 4 * 128 * 24 * 512 * (512 + 135 * 240)
    assert PROVIDERS["gather"].executed(uhd) == 4 * 128 * 24 * (160 * 256) * (4096 + 512) + text
    assert PROVIDERS["loop"].executed(uhd) == uhd.flops("window")
    plain = Task("flux-image-4096", SHAPES["flux-image-4096"], torch.bfloat16, "cpu")
    assert PROVIDERS["flex"].executed(plain) == plain.flops("window"), "tiles divide windows and patches here: nothing is wasted"
    assert providers.tiled_flops(plain, "sm_90") == plain.flops("window")
    small = Task("sd15", SHAPES["sd15-64-2048"], torch.float16, "cpu")
    assert providers.tiled_flops(small, "sm_90") == small.flops("window") * 64 // 40
    ragged = Task("x", Shape((256, 256), (64, 64), (32, 32), 10, 64, text=77), torch.bfloat16, "cpu", "global")  # blocks of 64
    assert providers.tiled_flops(ragged, "sm_90") == 4 * 64 * 10 * (65536 * (4096 + 128) + 128 * (65536 + 128))
    assert PROVIDERS["natten"].executed(plain) is None


def test_views_are_those_that_are_counted_elsewhere() -> None:
    for length, native in ((128, 64), (512, 64), (135, 64), (64, 64), (65, 64)):
        starts = view_starts(length, native)
        assert starts == views_of_the_library(length, window=native, stride=native // 2)
        assert (starts[0], starts[-1]) == (0, length - native)


def test_what_no_machine_can_hold_or_wait_for_is_refused() -> None:
    """Scores of all tokens on a CPU, where nobody says that memory is out."""
    flux = Task("flux-8192", SHAPES["flux-8192"], torch.bfloat16, "cpu", "global")
    assert "may take 2.1 GB, got 6622.9 GB" in PROVIDERS["full-math"].refusal(flux)
    assert PROVIDERS["full-math"].refusal(replace(flux, device="cuda")) == ""
    for name, rule in (("flex", "window"), ("full", "window"), ("multidiffusion", "global")):
        assert f"it cannot attend to text by the rule {rule!r}: see the rule " in PROVIDERS[name].refusal(replace(flux, rule=rule))
