"""The low-pass kernel to compile: both directions, every entry of `launch_config`'s table, one and three pictures, on meta tensors.

Gates: no spills in the main loops, and few around them; TF32 or fp32 matrix instructions; loads and stores of 16 bytes (8 on AMD, and
of 16-bit pictures by dense factors) wherever neighbours in memory allow them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.compile.binary import Binary, spills
from scalediff_kernels._launch import Launch
from scalediff_kernels.lowpass.geometry import Kind
from scalediff_kernels.lowpass.launch import separable_launch
from scalediff_kernels.lowpass.op import picture_size
from scalediff_kernels.lowpass.operators import LowPass, Side
from scalediff_kernels.neighborhood.config import shared_memory

CASE = ("side", "kind", "dtype", "layout", "pictures")  # columns of a row: attributes of the case and of its configuration
CONFIG = {"tile": "tile", "channels": "channels", "steps": "steps", "warps": "num_warps", "stages": "num_stages"}
KEYS = {name: name for name in CASE}  # columns of the page's table
SHOWN = ""  # all rows

FEW = 24  # loads and stores of spilled registers, once per step of the outer loop

SHAPES = {
    "latent": (1, 4, 512, 512),
    "odd": (1, 4, 509, 511),  # rows that no aligned load may assume
    "mixed": (1, 4, 512, 512),  # x in fp32, outputs in dtype
    "feature maps": (1, 320, 512, 512),
    "channels last": (1, 320, 512, 512),
    "packed": (1, 16, 256, 2, 256, 2),
    "64-bit": (1, 320, 2048, 4096),
}


@dataclass(frozen=True)
class Case:
    side: Side
    layout: str
    dtype: torch.dtype = torch.float32
    pictures: int = 1
    kind: Kind = "resize"

    def launch(self, device: str) -> Launch:
        x = torch.empty(SHAPES[self.layout], dtype=self.dtype, device="meta")
        if self.layout == "channels last":
            x = x.to(memory_format=torch.channels_last)
        if self.layout == "packed":
            x = torch.empty(1, 256, 256, 16, 2, 2, dtype=self.dtype, device="meta").permute(0, 3, 1, 4, 2, 5)
        size = picture_size(x)
        axes = LowPass(size[0], 0.125, self.kind), LowPass(size[1], 0.125, self.kind)
        coarse = torch.empty(*x.shape[:2], axes[0].coarse, axes[1].coarse, device="meta")
        pictures, weights = [x] * self.pictures, [0.5] * self.pictures
        if self.side == "down":
            if self.layout == "mixed":
                pictures[-1] = x.float()
            reference = [coarse] if self.pictures == 3 else []
            return separable_launch(coarse, pictures, weights, axes, "down", reference, [1.0] * len(reference), device=device)
        return separable_launch(torch.empty_like(x), [coarse], [0.5], axes, "up", pictures, weights, device=device)

    def faults(self, target: str, launch: Launch, binary: Binary) -> list[str]:
        spilled = sum(map(spills, binary.loops)) if binary.loops else binary.spills
        amd, neighbours = target.startswith("gfx"), self.layout not in ("packed", "odd")
        product = "v_mfma" if amd else r"\b(?:HMMA|HGMMA|UTC\w*MMA)\S*TF32"
        # The tiles of dense factors are small.
        width = "(?:64|128)" if self.kind != "resize" and self.dtype is torch.bfloat16 else "128"
        load = r"(?:global|buffer)_load_dwordx[24]" if amd else rf"\bLDG(?:STS)?\S*\.{width}\b"
        store = r"(?:global|buffer)_store_dwordx[24]" if amd else rf"\bSTG\S*\.{width}\b"
        checks = {
            f"{binary.shared} bytes of shared memory, {shared_memory(target)} there": binary.shared > shared_memory(target),
            f"{spilled} spills in the main loops": spilled > 0,
            f"{binary.spills} spills": binary.spills > FEW,
            f"no {product}": not binary.count(product),
            # the factors' own loads are wide in any case
            "pictures without wide loads": neighbours and self.pictures > 0 and binary.count(load) <= self.pictures,
            "no wide stores": neighbours and self.side == "up" and not binary.count(store),
        }
        return [fault for fault, found in checks.items() if found]


def cases(_: str) -> Iterator[Case]:
    """Of every target: pictures of every layout, as many as there may be; a dense factor for planes and for channels."""
    sides: tuple[Side, Side] = ("down", "up")
    for dtype in (torch.float32, torch.bfloat16):
        for side in sides:
            for layout in SHAPES:
                if layout != "mixed" or (side == "down" and dtype is torch.bfloat16):
                    for pictures in (2, 3) if layout == "mixed" else (1, 2, 3) if side == "down" else (0, 1, 2):
                        yield Case(side, layout, dtype, pictures)
            for layout in ("latent", "channels last"):
                for pictures in (1, 3) if side == "down" else (0, 2):
                    yield Case(side, layout, dtype, pictures, "gaussian")
