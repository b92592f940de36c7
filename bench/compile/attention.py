"""The attention kernels to compile: every entry of `launch_config`'s table, at a full and a padded head dim, on meta tensors.

Gates: no spills (fp32, which runs beside the tensor cores: none in the main loops); the generation's matrix instructions; TMA on
the descriptor path, cp.async on the pointer path; no trip of keys or values through registers in the main loops of sm_90; there no
warpgroup products that wait for each other, and nowhere a softmax that several warps repeat, but for what docs/evidence/compiled.md names.
Of the warp-specialised kernel also: one main loop for each consumer, all its products, and its softmax between the two waits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from bench.compile.binary import Binary, exponentials, order, serialised, spills
from scalediff_kernels._launch import Launch
from scalediff_kernels.neighborhood.config import LaunchConfig, Path, shared_memory
from scalediff_kernels.neighborhood.launch import image_launch, text_launch

HEAD_DIMS = {torch.bfloat16: (40, 64, 128, 160), torch.float32: (64, 160)}  # every column of the table, full and padded

MOVES = r"\b(?:LDSM|STSM|STS|LDS)\b"  # between registers and shared memory
FEW = 24  # loads and stores of spilled registers outside the main loops, once a tile
PIPELINED = ("products", "wait 1", "exponentials", "wait 0")  # the softmax of a block runs beside P V of the block before
REPEATED = 1.5  # exponentials a score: one, and one a row and key block, which the four threads of a row compute alike

CASE = ("queries", "dtype", "head_dim", "layout", "window", "text")  # columns of a row: attributes of the case and of its configuration
CONFIG = {"path": "path", "query_box": "query_box", "key_box": "key_box", "warps": "num_warps", "stages": "num_stages"}
KEYS = {"queries": "queries", "dtype": "dtype", "head_dim": "D", "text": "text"}  # columns of the page's table, and their headings
SHOWN = "window == '64x64' and text in ('0', '512') and layout == 'contiguous'"  # rows of the page's table: the paper's windows


@dataclass(frozen=True)
class Case:
    """One launch to compile: the FLUX grid at 4096 px by default."""

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
    rope: bool = True  # whether text is rotated
    path: Path | None = None  # the path to take; None: the one of the table

    def launch(self, device: str, config: LaunchConfig | None = None) -> Launch:
        def tokens(*shape: int) -> Any:
            x = torch.empty(self.batch, *shape, self.heads, self.head_dim, dtype=self.dtype, device="meta")
            return x.expand(2, *x.shape[1:]) if self.layout == "expanded" else x

        q, k, v = (tokens(*self.grid) for _ in range(3))
        texts: list[Any] = [tokens(self.text) if self.text else None for _ in range(3)]
        text_q, text_k, text_v = texts
        rope = (torch.empty(64, self.head_dim // 2, device="meta"),) * 2 if self.text and self.rope else None
        arguments: dict[str, Any] = {
            "window": self.window, "patch": self.patch, "offset": (0, 0), "scale": self.head_dim**-0.5, "device": device,
            "path": self.path, "config": config,
        }  # fmt: skip
        if self.queries == "image":
            return image_launch(torch.empty_like(q), q, k, v, text_k, text_v, rope, **arguments)
        return text_launch(torch.empty_like(text_q), text_q, k, v, text_k, text_v, rope, **arguments)

    def _known(self, target: str) -> bool:
        """Whether docs/evidence/compiled.md names the fault as known and not gated."""
        if self.head_dim > 128:
            return self.text > 0 or prod(self.patch) < 64 or target not in ("sm_90", "sm_100")
        return self.queries == "text" and prod(self.window) < 16

    def faults(self, target: str, launch: Launch, binary: Binary) -> list[str]:
        if launch.config.path == "warp-specialised":
            return self._pipeline_faults(target, launch, binary)
        config, nvidia, descriptors = launch.config, target.startswith("sm_"), launch.config.path == "descriptor"
        exact = self.dtype is torch.float32
        spilled = sum(map(spills, binary.loops)) if exact and binary.loops else binary.spills
        wide = prod(config.query_box) >= 64  # a matrix instruction of sm_90 and sm_100 takes 64 rows
        products = {"gfx942": "v_mfma"} | ({"sm_90": r"\bHGMMA", "sm_100": r"\bUTCHMMA"} if wide else {})
        product = products.get(target, r"\bHMMA")
        moves = any(re.search(MOVES, i) for loop in binary.loops for i in loop)
        scores = prod(config.query_box) * max(prod(config.key_box), config.text_block if self.text else 0)
        # of the larger of two loops' keys, where text and window have blocks of two sizes
        repeated = max((exponentials(loop, config.num_warps) / scores for loop in binary.loops), default=0)
        must_describe = self.layout == "contiguous" and min(self.window) >= 4 and target in ("sm_90", "sm_100")
        copies = config.num_stages > 1 and nvidia and not descriptors
        waits = any(map(serialised, binary.loops)) and not self._known(target)
        checks = {
            "no main loop found": nvidia and not binary.loops,
            f"{binary.shared} bytes of shared memory, {shared_memory(target)} there": binary.shared > shared_memory(target),
            f"{spilled} spills": spilled > 0,
            "no TMA": descriptors and not binary.count(r"\bUTMALDG"),
            "not on the descriptor path": not exact and must_describe and not descriptors,
            f"no {product}": not exact and not binary.count(product),
            "keys or values go through registers in the main loop": not exact and target == "sm_90" and descriptors and wide and moves,
            "products that wait for each other": not exact and waits,
            f"{repeated:.2f} exponentials a score": not exact and repeated > REPEATED and not self._known(target),
            "no cp.async": not exact and copies and not binary.count(r"\bLDGSTS"),
        }
        return [fault for fault, found in checks.items() if found]

    def _pipeline_faults(self, target: str, launch: Launch, binary: Binary) -> list[str]:
        """What is wrong with a binary of the warp-specialised kernel; its innermost loops are consumers, of 64 rows and four warps each."""
        constants = launch.arguments["C"]
        inside = sum(map(spills, binary.loops))
        products = constants.block_d // 16 + constants.n // 16  # each 64 rows by 16 channels, or by 16 keys
        loads = (2 + constants.consumers) * -(-constants.block_d // 64)  # of keys, values and queries, each in boxes of 128 bytes at most
        repeated = max((exponentials(loop, 4) / (constants.m * constants.n) for loop in binary.loops), default=0)
        waits = [order(loop) for loop in binary.loops if order(loop) != PIPELINED]
        checks = {
            f"{len(binary.loops)} main loops for {constants.consumers} consumers": len(binary.loops) != constants.consumers,
            f"{binary.shared} bytes of shared memory, {shared_memory(target)} there": binary.shared > shared_memory(target),
            f"{inside} spills in the main loops": inside > 0,
            f"{binary.spills - inside} spills": binary.spills - inside > FEW and not self._known(target),
            "no registers change hands": not binary.count(r"\bUSETMAXREG"),
            f"{binary.count('UTMALDG')} loads by TMA": binary.count(r"\bUTMALDG") < loads,
            f"not {products} products in every main loop": any(sum("HGMMA" in i for i in loop) != products for loop in binary.loops),
            f"a main loop in the order {', '.join(waits[0]) if waits else ''}": bool(waits),
            "keys or values go through registers in the main loop": any(re.search(MOVES, i) for loop in binary.loops for i in loop),
            f"{repeated:.2f} exponentials a score": repeated > REPEATED,
        }
        return [fault for fault, found in checks.items() if found]


def cases(target: str) -> Iterator[Case]:
    """Every entry of the table for a target: what the table chooses, and where that is the warp-specialised kernel its second choice."""
    for case in _cases(target):
        yield case
        if case.launch(target).config.path == "warp-specialised":
            yield replace(case, path="descriptor")


def _cases(target: str) -> Iterator[Case]:
    """Windows that boxes tile, and that they do not; text none, even, ragged, rotated or not; both kernels, every layout."""
    for dtype, dims in HEAD_DIMS.items():
        for dim in dims:
            yield Case(dim, dtype)
            yield Case(dim, dtype, text=512)
            yield Case(dim, dtype, text=512, queries="text")
            for window, patch in (((52, 76), (26, 38)), ((27, 15), (13, 7))):
                yield Case(dim, dtype, window=window, patch=patch, text=77)
            yield Case(dim, dtype, window=(52, 76), patch=(26, 38), text=77, queries="text")
            for queries in ("image", "text"):
                yield Case(dim, dtype, text=77, queries=queries, layout="expanded")
                if not (queries == "text" and dtype is torch.float32 and dim > 128):  # known to spill
                    yield Case(dim, dtype, window=(3, 3), patch=(2, 2), text=77, queries=queries)
            yield Case(dim, dtype, window=(16, 16), patch=(4, 4))
            if dtype is torch.bfloat16 and target == "sm_90":  # where text that is not rotated takes another entry
                yield Case(dim, dtype, text=333, rope=False)
                yield Case(dim, dtype, text=333, rope=False, queries="text", window=(256, 256), patch=(256, 256))  # the rule "global"
