"""torch's own attention, for `bench.attention`: windows gathered or looped over, the whole grid, MultiDiffusion's views.

Legend: B batch, H heads, G key heads, T text tokens, D head dim, W x W window, P x P patch, n windows or views, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.attention.gate import Outputs
from bench.attention.providers import Provider, Ready, answers, as_is, heads_first, held_bytes, image_and_text, result_bytes
from bench.attention.shapes import Inputs, Task
from bench.harness.timing import Call
from scalediff_kernels.neighborhood.reference import rotate_pairs

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


Parts = tuple[Tensor, Tensor, Tensor]  # q, k and v of one call, `[B, H or G, S, D]`


class _Sdpa(Provider):
    """torch's scaled_dot_product_attention by whichever backend it chooses, or by a named one."""

    base: str

    def __init__(self, backend: str = "") -> None:
        self.backend = backend
        self.name = f"{self.base}-{backend}" if backend else self.base

    def refusal(self, task: Task) -> str | None:
        if task.device == "cpu" and self.backend in ("cudnn", "efficient"):
            return f"torch has no {self.backend} attention on CPUs"
        return None

    def prepare(self, task: Task) -> Ready:
        """With the named backend alone allowed around every call: once a call, however many windows it loops over."""
        ready = self.ready(task)
        return ready._replace(run=self._forced(ready.run), backend=self._forced(ready.backend)) if self.backend else ready

    def ready(self, task: Task) -> Ready:
        """As `prepare`, by whichever backend torch chooses."""
        raise NotImplementedError

    def _forced(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def inside(laid: Any) -> Any:
            with sdpa_kernel(BACKENDS[self.backend]):
                return function(laid)

        return inside

    def scores(self, batch: int, queries: int, keys: int, task: Task) -> int:
        """Bytes that the math backend takes for scores and weights; the others make none."""
        return 3 * 4 * batch * task.shape.heads * queries * keys if self.backend == "math" else 0


class Gather(_Sdpa):
    """As the method's authors do it: query canvas padded to whole patches, windows copied out into one batch, one SDPA; no jitter.

    Under the rule "window" text is copied into every window, turned and joined, and its results are averaged.
    """

    base = "gather"

    def memory(self, task: Task) -> int:
        windows, s = prod(map(len, task.spans)), task.shape
        queries = windows * (prod(s.patch) + (s.text if task.rule == "window" else 0))
        keys = windows * (prod(task.window) + s.text)
        joined = 2 if task.rule else 1  # windows, and windows with text
        elements = s.batch * s.head_dim * (3 * queries * s.heads + 2 * joined * keys * s.key_heads)
        scores = self.scores(s.batch * windows, queries // windows, keys // windows, task)
        return elements * task.dtype.itemsize + result_bytes(task) + scores

    def executed(self, task: Task) -> int | None:
        s, windows = task.shape, prod(map(len, task.spans))
        image = 4 * s.batch * s.heads * s.head_dim * windows * prod(s.patch) * (prod(task.window) + s.text)
        return image + task.flops("window") - _image_flops(task)

    def ready(self, task: Task) -> Ready:
        cut, attend, assemble = self._steps(task)
        return Ready(as_is, lambda inputs: assemble(attend(cut(inputs))), image_and_text, lambda inputs: answers(*cut(inputs)[0]))

    def _steps(
        self, task: Task
    ) -> tuple[
        Callable[[Inputs], list[Parts]], Callable[[list[Parts]], list[Tensor]], Callable[[list[Tensor]], tuple[Tensor, Tensor | None]]
    ]:
        """Windows copied out, attention alone, results put back; under the rule "global" the text queries' attention is the second one."""
        rows, columns = task.spans
        device, (patch_y, patch_x) = task.device, task.shape.patch
        key_y = torch.tensor([[*range(s.key_start, s.key_stop)] for s in rows], device=device)[:, None, :, None]
        key_x = torch.tensor([[*range(s.key_start, s.key_stop)] for s in columns], device=device)[None, :, None, :]
        pad = (0, 0, 0, 0, 0, len(columns) * patch_x - task.shape.grid[1], 0, len(rows) * patch_y - task.shape.grid[0])

        def cut(inputs: Inputs) -> list[Parts]:
            """Patches `[B n, H, P P, D]` and windows `[B n, G, W W, D]`, with text before them."""
            q, k, v = inputs.image
            q = (F.pad(q, pad) if any(pad) else q).unflatten(2, (-1, patch_x)).unflatten(1, (-1, patch_y)).transpose(2, 3)
            parts = [q.flatten(3, 4).flatten(1, 2), *(x[:, key_y, key_x].flatten(3, 4).flatten(1, 2) for x in (k, v))]  # [B, n, S, H, D]
            if task.rule:
                texts = [x[:, None].expand(-1, parts[0].shape[1], -1, -1, -1) for x in inputs.text]
                if inputs.rope is not None:
                    texts[:2] = [_turned(x, inputs.rope) for x in inputs.text[:2]]
                first = 0 if task.rule == "window" else 1  # queries of text are elsewhere under the rule "global"
                parts[first:] = [torch.cat(pair, 2) for pair in zip(texts[first:], parts[first:], strict=True)]
            q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in parts)
            if task.rule != "global":
                return [(q, k, v)]
            text_q, text_k, text_v = inputs.sequences
            return [(q, k, v), (heads_first(text_q[:, : task.shape.text]), heads_first(text_k), heads_first(text_v))]

        def attend(calls: list[Parts]) -> list[Tensor]:
            return [_attend(*call, scale=task.scale) for call in calls]

        def assemble(results: list[Tensor]) -> tuple[Tensor, Tensor | None]:
            out = results[0].transpose(1, 2).unflatten(0, (task.shape.batch, -1))  # [B, n, S, H, D]
            text = results[1].transpose(1, 2) if task.rule == "global" else None
            if task.rule == "window":
                text, out = out[:, :, : task.shape.text].mean(1), out[:, :, task.shape.text :]
            canvas = out.unflatten(2, (patch_y, patch_x)).unflatten(1, (len(rows), len(columns))).transpose(2, 3)
            return canvas.flatten(3, 4).flatten(1, 2)[:, : task.shape.grid[0], : task.shape.grid[1]], text

        return cut, attend, assemble


class Windows(Gather):
    """The attention of `Gather` alone, on windows that lie ready: what a dense kernel reaches at their length if copies cost nothing."""

    base = "windows"

    def memory(self, task: Task) -> int:
        return 2 * super().memory(task)  # one set laid out, another one's parts while it is made

    def ready(self, task: Task) -> Ready:
        cut, attend, assemble = self._steps(task)

        def lay(inputs: Inputs) -> list[Parts]:
            return [(q.contiguous(), k.contiguous(), v.contiguous()) for q, k, v in cut(inputs)]

        return Ready(
            lay, attend, lambda results: image_and_text(assemble(results)), lambda laid: f"{answers(*laid[0])}, windows lie ready"
        )  # fmt: skip


class Loop(_Sdpa):
    """One SDPA per window on slices, into one result: what is written by hand in ten lines. Text as in `Gather`."""

    base = "loop"

    def memory(self, task: Task) -> int:
        s, windows = task.shape, prod(map(len, task.spans))
        one = held_bytes(task, prod(s.patch) + s.text, 3 * s.heads) + held_bytes(task, prod(task.window) + s.text, 4 * s.key_heads)
        texts = 3 * 4 * s.batch * windows * s.text * s.heads * s.head_dim if task.rule == "window" else 0  # in fp32 until they are averaged
        return 2 * result_bytes(task) + one + texts

    def ready(self, task: Task) -> Ready:
        def run(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
            (q, k, v), (text_q, text_k, text_v) = inputs.image, inputs.text
            out, texts = torch.empty_like(q, memory_format=torch.contiguous_format), []
            for i, (y0, y1, key_y0, key_y1) in enumerate(task.spans[0]):
                for j, (x0, x1, key_x0, key_x1) in enumerate(task.spans[1]):
                    b_q = q[:, y0:y1, x0:x1].flatten(1, 2)
                    b_k, b_v = (x[:, key_y0:key_y1, key_x0:key_x1].flatten(1, 2) for x in (k, v))
                    if task.rule:
                        turned = [rotate_pairs(x.float(), inputs.rope, i, j).to(x.dtype) for x in (text_q, text_k)] if inputs.rope else None
                        b_q = torch.cat([(turned or [text_q])[0], b_q], 1) if task.rule == "window" else b_q
                        b_k, b_v = torch.cat([turned[1] if turned else text_k, b_k], 1), torch.cat([text_v, b_v], 1)
                    b_out = _attend(*(x.transpose(1, 2) for x in (b_q, b_k, b_v)), scale=task.scale).transpose(1, 2)
                    texts += [b_out[:, : -(y1 - y0) * (x1 - x0)].float()] if task.rule == "window" else []
                    out[:, y0:y1, x0:x1] = b_out[:, -(y1 - y0) * (x1 - x0) :].unflatten(1, (y1 - y0, x1 - x0))
            if task.rule == "global":
                q, k, v = inputs.sequences
                return out, _attend(*(heads_first(x) for x in (q[:, : task.shape.text], k, v)), scale=task.scale).transpose(1, 2)
            return out, torch.stack(texts).mean(0).to(out.dtype) if texts else None

        def backend(inputs: Inputs) -> str:
            q, k, v = (heads_first(x[:, : task.window[0], : task.window[1]]) for x in inputs.image)
            return answers(q, k, v)

        return Ready(as_is, run, image_and_text, backend)


class Full(_Sdpa):
    """Attention of every token to every token, as the unpatched model has it."""

    base, function = "full", "full"

    def refusal(self, task: Task) -> str | None:
        if task.rule == "window":
            return "full attention has no windows to average text over: see the rule 'global'"
        return super().refusal(task)

    def memory(self, task: Task) -> int:
        return 2 * result_bytes(task) + self.scores(task.shape.batch, task.shape.tokens, task.shape.tokens, task)

    def ready(self, task: Task) -> Ready:
        def lay(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (x.transpose(1, 2) for x in inputs.sequences)
            return q, k, v

        def unlay(out: Tensor) -> Outputs:
            text = task.shape.text
            return Outputs(out.transpose(1, 2)[:, text:], out.transpose(1, 2)[:, :text] if text else None)

        return Ready(lay, lambda laid: _attend(*laid, scale=task.scale), unlay, lambda laid: answers(*laid))


class MultiDiffusion(_Sdpa):
    """Full attention in all overlapping views of native size, half a view apart, as one batch that lies ready, text in each."""

    base, function = "multidiffusion", "views"

    def refusal(self, task: Task) -> str | None:
        if task.rule == "global":
            return "views attend with their own text: see the rule 'window'"
        return super().refusal(task)

    def memory(self, task: Task) -> int:
        return self._laid(task) + 2 * task.bytes("views") * task.shape.heads // (2 * (task.shape.heads + task.shape.key_heads))

    def _laid(self, task: Task) -> int:
        """Bytes of the views' q, k and v: of one set of inputs, and of the parts of another while it is made."""
        s = task.shape
        return 2 * task.bytes("views") * (s.heads + 2 * s.key_heads) // (2 * (s.heads + s.key_heads))

    def ready(self, task: Task) -> Ready:
        height, width = task.window

        def lay(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
            parts = []
            for image, text in zip(inputs.image, inputs.text, strict=True):
                views = [torch.cat([text, image[:, y : y + height, x : x + width].flatten(1, 2)], 1) for y, x in task.views]
                parts.append(torch.stack(views, 1).flatten(0, 1).transpose(1, 2))  # [B n, H, T + W W, D]
            q, k, v = parts
            return q, k, v

        def unlay(out: Tensor) -> Outputs:
            views = out.transpose(1, 2).unflatten(0, (task.shape.batch, -1))[:, :, task.shape.text :]
            return Outputs(views.flatten(1, 2), None)

        return Ready(lay, lambda laid: _attend(*laid, scale=task.scale), unlay, lambda laid: answers(*laid))


class OneWindow(NamedTuple):
    """Attention on one window alone: `call`, and its FLOPs."""

    call: Call
    flops: int


def one_window(task: Task) -> OneWindow:
    """With its text, and as often as there are windows: nothing is gathered or put back, and most of it stays in cache."""
    s = task.shape
    queries, keys = prod(s.patch) + (s.text if task.rule == "window" else 0), prod(task.window) + s.text
    rng = torch.Generator(task.device).manual_seed(0)
    q, k, v = (
        torch.randn(s.batch, heads, tokens, s.head_dim, generator=rng, dtype=task.dtype, device=task.device)
        for heads, tokens in ((s.heads, queries), (s.key_heads, keys), (s.key_heads, keys))
    )
    windows = prod(map(len, task.spans))

    def call() -> None:
        for _ in range(windows):
            _attend(q, k, v, scale=task.scale)

    return OneWindow(call, 4 * windows * s.batch * s.heads * s.head_dim * queries * keys)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """`[B, H, S, D]`."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _turned(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Text `[B, T, H, D]` rotated for every window, `[B, n, T, H, D]`, in fp32 as the models' own rotation is."""
    cos, sin = (table.flatten(0, 1)[None, :, None, None] for table in rope)
    even, odd = x[:, None, ..., 0::2].float(), x[:, None, ..., 1::2].float()
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


def _image_flops(task: Task) -> int:
    s = task.shape
    return 4 * s.batch * s.heads * s.head_dim * prod(s.grid) * (prod(task.window) + s.text)
