"""The attention kernels to compile: every entry of `launch_config`'s table, at a full and a padded head dim, on meta tensors.

Gates: no spills (fp32, which runs beside the tensor cores: none in the main loops); the generation's matrix instructions; TMA on
the descriptor path, cp.async on the pointer path; no trip of keys or values through registers in the main loops of sm_90; there no
warpgroup products that wait for each other, and nowhere a softmax that several warps repeat, but for what `KNOWN` names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from bench.compile.binary import Binary, exponentials, serialised, spills
from scalediff_kernels._launch import Launch
from scalediff_kernels.neighborhood.config import LaunchConfig, shared_memory
from scalediff_kernels.neighborhood.launch import image_launch, text_launch

HEAD_DIMS = {torch.bfloat16: (40, 64, 128, 160), torch.float32: (64, 160)}  # every column of the table, full and padded

REPEATED = 1.5  # exponentials a score: one, and one a row and key block, which the four threads of a row compute alike

KNOWN = """Known and not gated: head dims above 128, but for image queries without text on sm_90 and sm_100. Blocks with a warp for every 16
rows, which would mend it, spill; the shipped ones share rows between warps and repeat the softmax, and with text their products wait for
each other on sm_90. Warps of text queries share rows, too, where a window has fewer than 16 keys. Loops of gfx942 are not read."""

LEGEND = f"""Registers per thread / KB of shared memory per program; `p` marks the pointer path. Windows of 64 x 64, patches of 32 x 32,
24 heads; text rotated. Windows that boxes do not tile, small and tiny windows, ragged text and strides
that no descriptor takes are compiled and gated as well, not shown.

{KNOWN}"""


@dataclass(frozen=True)
class Case:
    """One launch to compile: the FLUX grid at 4096 px unless said."""

    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    text: int = 0
    queries: str = "image"
    grid: tuple[int, int] = (256, 256)
    window: tuple[int, int] = (64, 64)
    patch: tuple[int, int] = (32, 32)
    heads: int = 24
    batch: int = 1
    layout: str = "contiguous"  # "expanded": one batch seen twice, which no descriptor takes

    def launch(self, device: str, config: LaunchConfig | None = None) -> Launch:
        def tokens(*shape: int) -> torch.Tensor:
            x = torch.empty(self.batch, *shape, self.heads, self.head_dim, dtype=self.dtype, device="meta")
            return x.expand(2, *x.shape[1:]) if self.layout == "expanded" else x

        q, k, v = (tokens(*self.grid) for _ in range(3))
        text_q, text_k, text_v = (tokens(self.text) for _ in range(3)) if self.text else (None, None, None)
        rope = (torch.empty(64, self.head_dim // 2, device="meta"),) * 2 if self.text else None
        arguments: dict[str, Any] = {
            "window": self.window, "patch": self.patch, "offset": (0, 0), "scale": self.head_dim**-0.5, "device": device, "config": config,
        }  # fmt: skip
        if self.queries == "image":
            return image_launch(torch.empty_like(q), q, k, v, text_k, text_v, rope, **arguments)
        assert text_q is not None
        assert text_k is not None
        assert text_v is not None
        return text_launch(torch.empty_like(text_q), text_q, k, v, text_k, text_v, rope, **arguments)

    def facts(self, launch: Launch) -> dict[str, Any]:
        """Columns of a row."""
        config = launch.config
        return {
            "queries": self.queries, "dtype": str(self.dtype).removeprefix("torch."), "head_dim": self.head_dim, "layout": self.layout,
            "window": "x".join(map(str, self.window)), "text": self.text, "path": config.path,
            "query_box": "x".join(map(str, config.query_box)), "key_box": "x".join(map(str, config.key_box)),
            "warps": launch.arguments["num_warps"], "stages": config.num_stages,
        }  # fmt: skip

    def _known(self, target: str) -> bool:
        """Whether a fault is one of `KNOWN`."""
        if self.head_dim > 128:
            return self.text > 0 or prod(self.patch) < 64 or target not in ("sm_90", "sm_100")
        return self.queries == "text" and prod(self.window) < 16

    def faults(self, target: str, launch: Launch, binary: Binary) -> list[str]:
        """What is wrong with a binary."""
        found = []
        if target.startswith("sm_") and not binary.loops:
            found.append("no main loop found")
        if binary.shared > shared_memory(target):
            found.append(f"{binary.shared} bytes of shared memory, {shared_memory(target)} there")
        spilled = sum(map(spills, binary.loops)) if self.dtype is torch.float32 and binary.loops else binary.spills
        if spilled:
            found.append(f"{spilled} spills")
        descriptors = launch.config.path == "descriptor"
        if descriptors and not binary.count(r"\bUTMALDG"):
            found.append("no TMA")
        if self.dtype is torch.float32:
            return found
        if self.layout == "contiguous" and min(self.window) >= 4 and target in ("sm_90", "sm_100") and not descriptors:
            found.append("not on the descriptor path")
        generation = {"sm_90": r"\bHGMMA", "sm_100": r"\bUTCHMMA", "gfx942": "v_mfma"}
        wide = prod(launch.config.query_box) >= 64  # a matrix instruction of sm_90 and sm_100 takes 64 rows
        product = generation.get(target, r"\bHMMA") if wide or target == "gfx942" else r"\bHMMA"
        if not binary.count(product):
            found.append(f"no {product}")
        if target == "sm_90" and descriptors and wide and _moves(binary):
            found.append("keys or values go through registers in the main loop")
        if any(map(serialised, binary.loops)) and not self._known(target):
            found.append("products that wait for each other")
        scores = prod(launch.config.query_box) * max(prod(launch.config.key_box), launch.config.text_block if self.text else 0)
        # of the larger of two loops' keys, where text and window have blocks of two sizes
        repeated = max((exponentials(loop, launch.config.num_warps) / scores for loop in binary.loops), default=0)
        if repeated > REPEATED and not self._known(target):
            found.append(f"{repeated:.2f} exponentials a score")
        if target.startswith("sm_") and not descriptors and launch.config.num_stages > 1 and not binary.count(r"\bLDGSTS"):
            found.append("no cp.async")
        return found


def cases() -> Iterator[Case]:
    """Every entry of the table: windows that boxes tile, and that they do not; text none, even, ragged; both kernels, every layout."""
    for dtype, dims in HEAD_DIMS.items():
        for dim in dims:
            yield Case(dim, dtype)
            yield Case(dim, dtype, text=512)
            yield Case(dim, dtype, text=512, queries="text")
            for window, patch in (((52, 76), (26, 38)), ((27, 15), (13, 7))):
                yield Case(dim, dtype, window=window, patch=patch, text=77)
            yield Case(dim, dtype, window=(52, 76), patch=(26, 38), text=77, queries="text")
            for queries in ("image", "text"):
                yield Case(dim, dtype, window=(3, 3), patch=(2, 2), text=77, queries=queries)
                yield Case(dim, dtype, text=77, queries=queries, layout="expanded")
            yield Case(dim, dtype, window=(16, 16), patch=(4, 4))


def table(rows: Sequence[Mapping[str, str]], targets: Sequence[str]) -> list[str]:
    """Lines of a markdown table: the paper's windows."""
    lines = ["| queries | dtype | D | text | " + " | ".join(targets) + " |", "|---|---|--:|--:|" + "--:|" * len(targets)]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for r in rows:
        if r["window"] == "64x64" and r["text"] != "77" and r["layout"] == "contiguous":
            path = "" if r["path"] == "descriptor" else "p "
            cell = f"{path}{r['registers']}/{-(-int(r['shared']) // 1024)}" if r["registers"] else "does not compile"
            cells.setdefault((r["queries"], r["dtype"], r["head_dim"], r["text"]), {})[r["target"]] = cell
    return lines + ["| " + " | ".join([*key, *(row.get(t, "") for t in targets)]) + " |" for key, row in cells.items()]


def _moves(binary: Binary) -> bool:
    """Whether a loop moves anything between registers and shared memory."""
    return any(re.search(r"\b(?:LDSM|STSM|STS|LDS)\b", i) for loop in binary.loops for i in loop)
