"""The layout of the tokens in an attention call: the token grid, and the position of text.

A call of scaled_dot_product_attention gives the number of tokens but not their grid. A `Layout` describes one forward pass: the token
grid and the text come from the denoiser's arguments, and a call is recognised by its sequence lengths.

Legend: B batch, Y x X token grid, S tokens of a sequence.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from torch import Tensor

Grid = tuple[int, int]
Role = Literal["self", "joint", "cross", "text"]
Side = Literal["prefix", "suffix"]


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a denoiser.

    Attributes:
        name: Path of the module in the denoiser.
        role: The kind of attention: image to image (`"self"`), image and text in one softmax (`"joint"`), image to text
            (`"cross"`), text to text (`"text"`).
        level: Number of times that the module's token grid has been halved.
        obstacle: Why the module's calls cannot be intercepted; empty if they can.
    """

    name: str
    role: Role
    level: int = 0
    obstacle: str = ""


class Span(NamedTuple):
    """Samples `[first, last)` of a batch whose text is tokens `[text_start, text_stop)` and whose image starts at token `image`."""

    first: int
    last: int
    text_start: int
    text_stop: int
    image: int


def checked_grid(grid: Grid) -> Grid:
    """A token grid as two plain integers.

    Raises:
        ValueError: It is not two positive integers.
        TypeError: It is no sequence, or its elements are not integers.
    """
    contract = "grid must be two positive integers (Y, X) in tokens"
    try:
        sides = tuple(operator.index(side) for side in grid)
    except TypeError as error:
        raise TypeError(f"{contract}, got grid={grid!r}") from error
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"{contract}, got grid={grid!r}")
    return sides[0], sides[1]


def _count(name: str, value: int) -> int:
    """A number of tokens or levels as a plain integer, which is not negative."""
    try:
        count = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {name}={value!r}") from error
    if count < 0:
        raise ValueError(f"{name} must not be negative, got {name}={value!r}")
    return count


def _counts(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """Numbers of tokens as a tuple of plain integers, none of which is negative."""
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a tuple of integers, got {name}={values!r}")
    return tuple(_count(name, value) for value in values)


@dataclass(frozen=True)
class Sequence:
    """One kind of token sequence in a forward pass: the image tokens, row by row, and other tokens in the same softmax.

    The other tokens are called text here. They may also be registers, or padding that the model attends to.

    Attributes:
        grid: Grid `(Y, X)` of the image tokens.
        level: Number of times that the grid has been halved.
        side: Whether the text comes before (`"prefix"`) or after (`"suffix"`) the image.
        text: Number of text tokens in the sequence, including padding.
        real: Number of text tokens of each sample that are not padding; these come first. Padding is neither attended to nor computed.
            Empty if no sample has padding.
        ragged: Whether the image directly follows each sample's text, so that padding is at the end of the sequence.
        queries: `"all"`, or `"image"` if text is only among the keys.
        shards: Number of parts into which text and image were each split, as `torch.tensor_split` does, before the parts were put in one
            sequence: for N parts `[text 0, image 0, text 1, image 1, ... text N-1, image N-1]`, or `[image 0, text 0, ...]` with
            `side="suffix"`. All other attributes describe text and image in one piece. Ulysses attention, where every device holds one
            part, gathers tokens in this order.

    Raises:
        ValueError: A number is out of range, a choice is not one of those listed, or a `ragged` sequence has several shards.
        TypeError: A number is not an integer.
    """

    grid: Grid
    level: int = 0
    side: Side = "prefix"
    text: int = 0
    real: tuple[int, ...] = ()
    ragged: bool = False
    queries: Literal["all", "image"] = "all"
    shards: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", checked_grid(self.grid))
        for name in ("level", "text"):
            object.__setattr__(self, name, _count(name, getattr(self, name)))
        for name, allowed in (("side", get_args(Side)), ("queries", ("all", "image"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {name}={getattr(self, name)!r}")
        object.__setattr__(self, "real", _counts("real", self.real))
        if any(count > self.text for count in self.real):
            raise ValueError(f"real must be numbers of text tokens from 0 to text={self.text}, got real={self.real}")
        if operator.index(self.shards) < 1:
            raise ValueError(f"shards must be at least 1, got shards={self.shards}")
        if self.ragged and self.shards > 1:
            raise ValueError(f"a ragged sequence has its padding at the end and must have one shard, got shards={self.shards}")

    @property
    def area(self) -> int:
        """Number of image tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of query tokens, number of key tokens."""
        keys = self.area + self.text
        return (keys if self.queries == "all" else self.area), keys

    def spans(self, batch: int) -> tuple[Span, ...]:
        """Position of text and image in every sample; adjacent samples with equal positions share one span.

        Raises:
            ValueError: `real` does not have `batch` entries.
        """
        start = 0 if self.side == "prefix" else self.area
        if not self.real:
            return (Span(0, batch, start, start + self.text, 0 if self.side == "suffix" else self.text),)
        if len(self.real) != batch:
            raise ValueError(f"the text lengths are for a batch of {len(self.real)} samples, got a batch of {batch}")
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
    """The layout of the tokens of one forward pass: every kind of sequence that attends to itself and contains the image.

    For example, a transformer with 77 text tokens before a picture of 128 x 96 tokens, in whose last blocks the picture is alone:

        Layout((128, 96), (Sequence((128, 96), text=77), Sequence((128, 96))))

    Attributes:
        grid: Grid `(Y, X)` of the image tokens at the finest level.
        sequences: The sequences that contain the image and attend to themselves.
        others: Lengths of all other sequences: text that attends to itself, or that the image attends to. Calls are recognised by
            their lengths, so a call with one of these lengths runs full attention.
        masked: Whether `real` and `weights` already describe the attention masks of the pass; the masks are then ignored.
        weights: `[B, S]`, m, if the model adds m_i m_j to the score of query i and key j; text and image in one piece, also where a
            sequence has shards. Not compared by `==`.

    Raises:
        ValueError: The grid is not two positive integers, there is no sequence, the grid of a sequence is not that of its level, or a
            length is negative.
        TypeError: `sequences` has something else than a `Sequence`, or a length is not an integer.
    """

    grid: Grid
    sequences: tuple[Sequence, ...]
    others: tuple[int, ...] = ()
    masked: bool = False
    weights: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", checked_grid(self.grid))
        if not isinstance(self.sequences, tuple | list) or not all(isinstance(sequence, Sequence) for sequence in self.sequences):
            raise TypeError(f"sequences must be a tuple of Sequence, got sequences={self.sequences!r}")
        if not self.sequences:
            raise ValueError("sequences must have at least one Sequence, got sequences=()")
        for sequence in self.sequences:
            rows_and_columns = zip(self.grid, sequence.grid, strict=True)
            if not all((n >> sequence.level) - 1 <= own <= (n >> sequence.level) + 2 for n, own in rows_and_columns):
                raise ValueError(
                    f"a sequence at level={sequence.level} must have the layout's grid {self.grid}, halved {sequence.level} times, "
                    f"got grid={sequence.grid}"
                )
        object.__setattr__(self, "sequences", tuple(self.sequences))
        object.__setattr__(self, "others", _counts("others", self.others))


class UnknownLayout(Exception):
    """The token layout of a forward pass cannot be determined, so it runs full attention.

    Attributes:
        tokens: Number of image tokens, if known.
    """

    def __init__(self, why: str, tokens: int | None = None) -> None:
        super().__init__(why)
        self.tokens = tokens


def level_grid(latent: Grid, level: int) -> Grid:
    """The grid after `level` convolutions of stride 2 and padding 1, each of which rounds up."""
    y, x = latent
    for _ in range(level):
        y, x = (y + 1) // 2, (x + 1) // 2
    return y, x


def split_sizes(tokens: int, shards: int) -> tuple[int, ...]:
    """Number of tokens in each part that `torch.tensor_split` makes: equal, or the first parts have one more."""
    least, longer = divmod(tokens, shards)
    return tuple(least + (part < longer) for part in range(shards))


def window_of(native: Grid, level: int) -> Grid:
    """Key/value window in tokens at a level: the model's native token grid there."""
    return level_grid(native, level)


def patch_of(native: Grid, level: int) -> Grid:
    """Query patch in tokens at a level: half the window, as in the paper."""
    y, x = window_of(native, level)
    return max(1, y // 2), max(1, x // 2)


def offset_of(native: Grid, level: int, fraction: tuple[float, float]) -> Grid:
    """Offset of the patch grid in tokens at a level, from a fraction of the patch in [0, 1) per axis."""
    patch = patch_of(native, level)
    return int(fraction[0] * patch[0]), int(fraction[1] * patch[1])
