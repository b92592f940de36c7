"""Models that nobody listed: where their grid comes from, what they compute, and what is refused or said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from bench.models.inputs import ids
from bench.models.zoo import WINDOW
from tests.conftest import seeded, state_of
from tests.scalediff.families.test_families import allowed
from tests.scalediff.patching.research_models import WIDTH, Attention, DoubleStreamDiT, SingleStreamDiT, VisionTransformer

SDPA = F.scaled_dot_product_attention
GRID = (9, 6)


def pictures(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(), dtype=torch.float64)


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().double()


def vit(grid: tuple[int, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (pictures(2, 3, 2 * grid[0], 2 * grid[1]),), {}


def single(grid: tuple[int, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (pictures(2, 4, 2 * grid[0], 2 * grid[1]), torch.ones(2, dtype=torch.float64)), {"caption": pictures(2, 5, 8)}


def doubled(grid: tuple[int, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (pictures(2, grid[0] * grid[1], 16), ids(grid).double()), {"txt": pictures(2, 5, 8)}


def grid_of_ids(arguments: Any) -> tuple[int, int]:
    last = arguments["img_ids"][-1]
    return int(last[1]) + 1, int(last[2]) + 1


CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], int, int, str]] = {
    # model, inputs, arguments of patch_model, where the image begins, tokens beside it, callers
    "vision transformer": (VisionTransformer, vit, {"text": ("prefix", 1)}, 1, 1, "blocks.0.attn"),
    "single stream": (SingleStreamDiT, single, {"text": ("suffix", "caption"), "window": WINDOW}, 0, 5, "SingleStreamDiT"),
    "double stream": (
        DoubleStreamDiT, doubled, {"text": ("prefix", "txt"), "grid": grid_of_ids, "window": WINDOW}, 5, 5, "double_blocks.0",
    ),
}  # fmt: skip


def forward(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(*inputs[0], **inputs[1])
    return out


@pytest.mark.parametrize("name", CASES)
def test_a_model_nobody_listed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a mask over everything, in fp64; the same bits at native size; nothing left behind."""
    kind, inputs, arguments, start, beside, caller = CASES[name]
    model = made(kind)
    plain, native, state = forward(model, inputs(GRID)), forward(model, inputs(WINDOW)), state_of(model)
    with warnings.catch_warnings(), scalediff.patch_model(model, text_queries="global", **arguments) as handle:
        warnings.simplefilter("error")
        assert "attention modules are listed here after the first pass above the window's area" in str(handle.report)
        assert torch.equal(forward(model, inputs(WINDOW)), native)
        out = forward(model, inputs(GRID))
        assert caller in {row.module for row in handle.report.patched}
        assert "4 x 4" in str(handle.report)
    assert state_of(model) == state
    assert torch.equal(forward(model, inputs(GRID)), plain)
    mask = torch.ones(54 + beside, 54 + beside, dtype=torch.bool)
    mask[start : start + 54, start : start + 54] = allowed(GRID, WINDOW, (2, 2))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: SDPA(q, k, v, mask))
    expected = forward(model, inputs(GRID))
    assert (out - expected).abs().max() < 1e-10 * expected.abs().max()
    assert (out - plain).abs().max() > 1e-5 * plain.abs().max()


def test_a_grid_may_be_given_as_numbers() -> None:
    model = made(DoubleStreamDiT)
    with scalediff.patch_model(model, grid=grid_of_ids, text=("prefix", 5), window=WINDOW):
        expected = forward(model, doubled(GRID))
    with scalediff.patch_model(model, grid=GRID, text=("prefix", 5), window=WINDOW):
        assert torch.equal(forward(model, doubled(GRID)), expected)


def test_a_square_number_of_tokens_is_not_a_grid() -> None:
    with pytest.raises(ValueError, match=r"DoubleStreamDiT belongs to no known family: pass its token grid as grid="):
        scalediff.patch_model(DoubleStreamDiT(), text=("prefix", "txt"), window=WINDOW)
    with pytest.raises(ValueError, match=r"the native size of SingleStreamDiT is not known: pass window=\(Y, X\)"):
        scalediff.patch_model(SingleStreamDiT(), text=("suffix", "caption"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (0, 4)}, r"grid must be two positive integers \(Y, X\) in tokens, got \(0, 4\)"),
        ({"window": (4, -1)}, r"window must be two positive integers \(Y, X\) in tokens, got window=\(4, -1\)"),
        ({"text": "prefix"}, r'text must be \("prefix" or "suffix", a number of tokens or the name of an argument'),
        ({"text": ("middle", 4)}, r"text must be .* got \('middle', 4\)"),
        ({"jitter": "much"}, r"jitter must be one of none, alternate, random, got jitter='much'"),
        ({"text_queries": "all"}, r"text_queries must be one of window, global, got text_queries='all'"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    model = VisionTransformer()
    with pytest.raises(ValueError, match=message):
        scalediff.patch_model(model, **arguments)
    assert type(model) is VisionTransformer


def test_an_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'windows'"):
        scalediff.patch_model(VisionTransformer(), windows=(4, 4))  # type: ignore[call-arg]


def test_a_grid_that_does_not_match_the_tokens_is_an_error() -> None:
    model = made(DoubleStreamDiT)
    plain = forward(model, doubled(GRID))
    with scalediff.patch_model(model, grid=(7, 7), text=("prefix", 5), window=WINDOW):
        with pytest.raises(ValueError, match=r"nothing was patched: .*tokens of 7 x 7, got 59, 59"):
            forward(model, doubled(GRID))
        with pytest.warns(UserWarning, match=r"double_blocks.0 runs full attention"):
            assert torch.equal(forward(model, doubled(GRID)), plain)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(forward(model, doubled(GRID)), plain)
    with (
        scalediff.patch_model(model, grid=(7, 7), text=("prefix", 5), window=WINDOW, strict=False),
        pytest.warns(UserWarning, match=r"double_blocks.0 runs full attention: .*tokens of 7 x 7"),
    ):
        assert torch.equal(forward(model, doubled(GRID)), plain)


def test_text_that_is_not_there_is_an_error() -> None:
    model = made(DoubleStreamDiT)
    with scalediff.patch_model(model, grid=GRID, window=WINDOW), pytest.raises(ValueError, match=r"tokens of 9 x 6, got 59, 59"):
        forward(model, doubled(GRID))
    with pytest.raises(ValueError, match="text must name an argument of the forward pass, one of img, img_ids, txt, got 'caption'"):
        scalediff.patch_model(model, grid=GRID, text=("prefix", "caption"), window=WINDOW)
    for strict in (True, False):
        with scalediff.patch_model(
            model, grid=lambda arguments: arguments["size"], text=("prefix", "txt"), window=WINDOW, strict=strict
        ) as handle:
            for _ in range(2 if strict else 0):
                with pytest.raises(ValueError, match=r"nothing was patched: DoubleStreamDiT .* token layout: KeyError\('size'\)"):
                    forward(model, doubled(GRID))
            if not strict:
                with pytest.warns(UserWarning, match=r"its arguments do not give the token layout: KeyError\('size'\)"):
                    forward(model, doubled(GRID))
            assert not handle.report.patched


class Masked(nn.Module):
    """One attention over 4-D latents, masked as it is told."""

    patch_size = 1

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options, self.qkv = options, nn.Linear(4, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(2).mT).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, **self.options)


class Nothing(nn.Module):
    patch_size = 1

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Masked(is_causal=True), "causal attention is not supported"),
        (lambda: Masked(attn_mask=torch.ones(54, 54, dtype=torch.bool).tril()), r"this attention mask is not supported"),
        (lambda: Masked(attn_mask=torch.eye(54)), r"this attention mask is not supported, got \(54, 54\) of torch.float"),
        (Nothing, "no call of scaled_dot_product_attention had the tokens of 9 x 6, in Nothing"),
    ],
)  # fmt: skip
def test_a_model_with_nothing_to_take_is_an_error(model: Callable[[], nn.Module], message: str) -> None:
    net = model()
    x = torch.randn(1, 4, *GRID, generator=seeded())
    plain = forward(net, ((x,), {}))
    with scalediff.patch_model(net, window=WINDOW), pytest.raises(ValueError, match=message):
        forward(net, ((x,), {}))
    with scalediff.patch_model(net, window=WINDOW, strict=False), pytest.warns(UserWarning, match=message.replace(", in Nothing", "")):
        assert torch.equal(forward(net, ((x,), {})), plain)
    assert F.scaled_dot_product_attention is SDPA


@pytest.mark.parametrize(
    "mask",
    [torch.ones(1, 1, 1, 54).bool(), torch.ones(1, 1, 54, 54).bool(), torch.ones(1, 1, 1, 1).expand(1, 1, 54, 54), torch.ones(54, 54)],
)
def test_a_mask_that_says_nothing_is_no_mask(mask: Tensor) -> None:
    """All True, or one number added to every score."""
    masked, free = Masked(attn_mask=mask), Masked()
    free.load_state_dict(masked.state_dict())
    x = torch.randn(1, 4, *GRID, generator=seeded())
    with scalediff.patch_model(masked, window=WINDOW), scalediff.patch_model(free, window=WINDOW):
        assert torch.equal(forward(masked, ((x,), {})), forward(free, ((x,), {})))


def test_key_heads_may_be_fewer() -> None:
    class Grouped(Masked):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x.flatten(2).mT).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)

    net, x = Grouped(), torch.randn(1, 4, *GRID, generator=seeded())
    q, k, v = net.qkv(x.flatten(2).mT).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    with scalediff.patch_model(net, window=WINDOW):
        out = forward(net, ((x,), {}))
    expected = SDPA(q, k[:, :1].expand_as(q), v[:, :1].expand_as(q), allowed(GRID, WINDOW, (2, 2)))
    torch.testing.assert_close(out, expected.detach(), rtol=1e-5, atol=1e-6)


def test_three_axes_are_said_to_be_too_few() -> None:
    class Flat(Masked):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x.flatten(2).mT).chunk(3, dim=-1)
            return F.scaled_dot_product_attention(q, k, v)

    net = Flat()
    with (
        scalediff.patch_model(net, window=WINDOW),
        pytest.raises(ValueError, match=r"must be \[B, H, S, D\], got \(1, 54, 32\) of torch.float32"),
    ):
        net(torch.randn(1, 4, *GRID))


def test_a_window_larger_than_the_training_grid_is_said() -> None:
    with pytest.warns(UserWarning, match=r"window=\(6, 4\) exceeds the 4 x 4 tokens that VisionTransformer was trained on"):
        scalediff.patch_model(VisionTransformer(), window=(6, 4))


def test_a_traced_graph_is_refused() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="patch the module that was traced, not the graph: its attention calls are fixed"):
        scalediff.patch_model(graph, grid=(4, 4))


@pytest.mark.parametrize(("jitter", "kinds"), [("none", 1), ("alternate", 2), ("random", 3)])
def test_jitter_moves_the_patches_once_per_step(jitter: Any, kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes with the same input tensor are one step; the global generator is not used."""
    model, state = made(VisionTransformer), torch.get_rng_state()
    steps = [vit((12, 10)) for _ in range(6)]
    with scalediff.patch_model(model, text=("prefix", 1), window=WINDOW, jitter=jitter, seed=3):
        outs = [forward(model, inputs) for inputs in steps for _ in range(2)]
        offsets = [call.offset for plan in model.__dict__["_scalediff"]._plans.values() for call in plan.calls[:1]]
    assert len(set(offsets)) == kinds
    assert all(torch.equal(first, second) for first, second in zip(outs[::2], outs[1::2], strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    with scalediff.patch_model(model, text=("prefix", 1), window=WINDOW, jitter=jitter, seed=3):
        assert torch.equal(forward(model, steps[0]), outs[0])
        assert torch.equal(forward(model, steps[1]), outs[2])


def test_offsets_begin_again() -> None:
    model, steps = made(VisionTransformer), [vit((12, 10)) for _ in range(3)]
    with scalediff.patch_model(model, text=("prefix", 1), jitter="random") as handle:
        first = [forward(model, inputs) for inputs in steps]
        handle.restart_jitter()
        assert all(torch.equal(forward(model, inputs), out) for inputs, out in zip(steps, first, strict=True))
        last = forward(model, steps[0])
        steps[0][0][0].add_(0)  # a sampler that works in place
        assert not torch.equal(forward(model, steps[0]), last)


def test_a_checkpoint_within_the_model_is_refused() -> None:
    """It would compute the block again in the backward pass, where nothing is patched."""
    model = made(VisionTransformer)
    block = model.blocks[0]["attn"]  # type: ignore[index, union-attr]
    own = block.forward
    for reentrant in (True, False):
        block.forward = lambda x, reentrant=reentrant: torch.utils.checkpoint.checkpoint(own, x, use_reentrant=reentrant)
        inputs = vit(GRID)[0][0].requires_grad_()
        with scalediff.patch_model(model, text=("prefix", 1)):
            with pytest.raises(NotImplementedError, match="gradient checkpointing is not supported: it computes blocks again"):
                model(inputs)
            forward(model, ((inputs,), {}))


def said_by_scalediff(warned: pytest.WarningsRecorder) -> list[str]:
    """Without what the garbage collector says meanwhile of objects of other tests."""
    return [said for one in warned.list if (said := str(one.message)).startswith("scalediff: ")]


def test_one_reason_is_said_once(recwarn: pytest.WarningsRecorder) -> None:
    model = made(DoubleStreamDiT)
    with scalediff.patch_model(model, grid=(7, 7), text=("prefix", 5), window=WINDOW, strict=False):
        for _ in range(3):
            forward(model, doubled(GRID))
    assert len(said_by_scalediff(recwarn)) == 1


def test_attention_modules_that_are_called_are_named(recwarn: pytest.WarningsRecorder) -> None:
    model = made(VisionTransformer)
    with scalediff.patch_model(model, text=("prefix", 1)) as handle:
        forward(model, vit(GRID))
        assert [(row.module, row.role, row.text) for row in handle.report.rows] == [
            (f"blocks.{n}.attn", "joint", "joint, prefix of 1") for n in range(2)
        ]
        assert str(handle.report).startswith(
            "VisionTransformer: 2 seen attention modules patched; only the attention changes; the sampling loop is your own code"
        )
    assert not said_by_scalediff(recwarn)
    assert isinstance(model.blocks[0]["attn"], Attention)  # type: ignore[index, union-attr]
