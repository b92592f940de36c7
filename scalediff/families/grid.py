"""Where the tokens of an attention call lie on the picture.

A call to scaled_dot_product_attention says how many tokens there are, never how they lie. A `Layout` says it for one forward
pass: the denoiser's arguments give the token grid and the text, and a call is recognised by the lengths of its sequences.

Legend: B batch, Y x X token grid, S tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

Grid = tuple[int, int]
Role = Literal["self", "joint", "cross", "text"]
Side = Literal["prefix", "suffix"]


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a denoiser.

    Attributes:
        name: Its path in the denoiser.
        role: What it attends to: the image (`"self"`), image and text in one softmax (`"joint"`), text from the image
            (`"cross"`), text alone (`"text"`).
        level: How often its grid has been halved.
        obstacle: Why its calls cannot be intercepted; empty where they can.
    """

    name: str
    role: Role
    level: int = 0
    obstacle: str = ""


class Span(NamedTuple):
    """Samples `[first, last)` of a batch, whose text is tokens `[text_start, text_stop)` and whose image begins at `image`."""

    first: int
    last: int
    text_start: int
    text_stop: int
    image: int


@dataclass(frozen=True)
class Sequence:
    """One kind of token sequence in a forward pass: the image, row by row, and the tokens in the same softmax.

    Those are called text, and may be registers or padding that the model attends to as well.

    Attributes:
        grid: Image tokens.
        level: How often the grid has been halved.
        side: Where the text stands.
        text: Text tokens as they lie in the sequence, padding included.
        real: Of each sample, how many of them are real, the first ones: padding is neither attended to nor computed. Empty:
            all of them in every sample.
        ragged: The image follows each sample's real text at once, and the padding stands at the end of the sequence.
        queries: `"all"`, or `"image"` where text is among the keys alone.
    """

    grid: Grid
    level: int = 0
    side: Side = "prefix"
    text: int = 0
    real: tuple[int, ...] = ()
    ragged: bool = False
    queries: Literal["all", "image"] = "all"

    @property
    def area(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of its queries and keys."""
        keys = self.area + self.text
        return (keys if self.queries == "all" else self.area), keys

    def spans(self, batch: int) -> tuple[Span, ...]:
        """Where text and image lie in every sample, neighbours that are alike as one.

        Raises:
            ValueError: `real` is of another batch.
        """
        start = 0 if self.side == "prefix" else self.area
        if not self.real:
            return (Span(0, batch, start, start + self.text, 0 if self.side == "suffix" else self.text),)
        if len(self.real) != batch:
            raise ValueError(f"the text lengths are those of {len(self.real)} samples, got a batch of {batch}")
        spans: list[Span] = []
        for sample, count in enumerate(self.real):
            image = 0 if self.side == "suffix" else (count if self.ragged else self.text)
            span = Span(sample, sample + 1, start, start + count, image)
            if spans and spans[-1][2:] == span[2:]:
                span = span._replace(first=spans.pop().first)
            spans.append(span)
        return tuple(spans)


@dataclass(frozen=True)
class Layout:
    """How the tokens of one forward pass lie.

    Attributes:
        grid: Image tokens of the finest level.
        sequences: What attends to itself and holds the image.
        others: Lengths of the sequences that do not: text that attends to itself or is attended to. A call is told from
            them by its length alone, so a sequence of one of these lengths is left to full attention.
        masked: Attention masks of these calls say no more than `real` and `weights` do.
        weights: `[B, S]`, m, where the model adds m_i m_j to the score of query i and key j; not compared.
    """

    grid: Grid
    sequences: tuple[Sequence, ...]
    others: tuple[int, ...] = ()
    masked: bool = False
    weights: Tensor | None = field(default=None, compare=False, repr=False)


class Unreadable(Exception):
    """A forward pass whose tokens cannot be laid out, and why: it runs full attention. With how many image tokens, if that is known."""

    def __init__(self, why: str, tokens: int | None = None) -> None:
        super().__init__(why)
        self.tokens = tokens


def level_grid(latent: Grid, level: int) -> Grid:
    """The token grid after `level` stride-2 convolutions with padding 1, each of which rounds up."""
    y, x = latent
    for _ in range(level):
        y, x = (y + 1) // 2, (x + 1) // 2
    return y, x


def window_of(native: Grid, level: int) -> Grid:
    """The key window in tokens: the model's native token grid at that level."""
    return level_grid(native, level)


def patch_of(native: Grid, level: int) -> Grid:
    """The query patch in tokens: half the window, as in the paper."""
    y, x = window_of(native, level)
    return max(1, y // 2), max(1, x // 2)


def offset_of(native: Grid, level: int, fraction: tuple[float, float]) -> Grid:
    """How far the patch grid is moved: a fraction of the patch in [0, 1), per axis, the same at every level."""
    patch = patch_of(native, level)
    return int(fraction[0] * patch[0]), int(fraction[1] * patch[1])
