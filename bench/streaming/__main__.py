"""The embedded model's autoencoder in bands and in tiles beside the same in one piece: `python -m bench.streaming`.

Every row decodes latents, or encodes a picture, in one way: the largest and the mean difference from one piece, how far the seam score
of a decoded picture at the period of the tiles is above that at other periods, and seconds. The picture is a true render of a scene.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.quality.metrics import seam_score
from scalediff.cascade.borrowing import tiled
from scalediff.cascade.streaming import streamed
from scalediff.demo import load_demo, scenes

HEADER = "| call | way | max difference | mean difference | seam score above controls | seconds |\n|---|---|--:|--:|--:|--:|"


@contextmanager
def in_tiles(vae: Any) -> Iterator[None]:
    vae.enable_tiling()
    yield
    vae.disable_tiling()


def lines(vae: Any, picture: Tensor, *, elements: int) -> Iterator[str]:
    """The table's rows: decode and encode in one piece, in bands and in tiles."""
    ways: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "one piece": nullcontext, "bands": partial(streamed, vae, elements=elements), "tiles": partial(in_tiles, vae),
    }  # fmt: skip
    latents = vae.encode(picture).latent_dist.mode()
    calls: dict[str, Callable[[], Tensor]] = {
        "decode": lambda: vae.decode(latents).sample, "encode": lambda: vae.encode(picture).latent_dist.mode(),
    }  # fmt: skip
    for call, run in calls.items():
        whole = run()
        for way, inside in ways.items():
            since = time.perf_counter()
            with inside():
                made = run()
            seconds, off = time.perf_counter() - since, (made - whole).double().abs()
            seam = f"{_seam(made, vae):.1f}" if call == "decode" else ""
            yield f"| {call} | {way} | {off.max():.1e} | {off.mean():.1e} | {seam} | {seconds:.2f} |"


def _seam(decoded: Tensor, vae: Any) -> float:
    """Steps at the borders of the tiles, which are three quarters of a tile apart, over those at other periods."""
    period = round(vae.tile_sample_min_size * (1 - vae.tile_overlap_factor))
    score, *controls = seam_score(decoded.clamp(-1, 1) / 2 + 0.5, period=period).values()
    return score - max(controls)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.streaming", description="An autoencoder in bands, in tiles and in one piece.")
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels (default: 512)")
    parser.add_argument("--tile", type=int, default=128, help="side of a tile in pixels (default: 128)")
    parser.add_argument("--elements", type=int, default=2**19, help="elements of an activation in a band (default: 2^19)")
    options = parser.parse_args(arguments)
    vae = load_demo().vae
    vae.tile_sample_min_size = options.tile
    vae.tile_latent_min_size = options.tile // 2 ** (len(vae.config.block_out_channels) - 1)
    picture = scenes.render(10_000, 1, options.size) * 2 - 1
    with torch.no_grad(), tiled(vae, on=False):
        print(HEADER, *lines(vae, picture, elements=options.elements), sep="\n")


if __name__ == "__main__":
    main()
