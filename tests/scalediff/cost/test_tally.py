"""FLOPs against torch's own count, and the tally of live bytes against sums by hand: `x` is given, [10, 10] in fp32, 400 bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from scalediff.cost.tally import Flops, KnownResults, peak_bytes
from tests.scalediff.cost.real_peaks import real_peak_of


def chain(x: Tensor) -> Tensor:
    return ((x + 1) * 2 - 3).exp()


def both_in_use(x: Tensor) -> Tensor:
    a, b = x + 1, x + 2
    return a + b


def views(x: Tensor) -> Tensor:
    a = x + 1
    return a.view(100)[10:50].view(4, 10).T[None].expand(7, 10, 4)


def in_place(x: Tensor) -> Tensor:
    x.mul_(2)
    a = x + 1
    return a.add_(1).relu_()


def freed(x: Tensor) -> Tensor:
    a = torch.cat([x] * 5)
    b = a.sum()
    del a
    return torch.cat([x] * 4) + b


def a_view_keeps_the_whole(x: Tensor) -> Tensor:
    a = torch.cat([x] * 5)[:1]
    return torch.cat([x] * 4) + a


def views_of_what_is_given(x: Tensor) -> Tensor:
    return x.T.reshape(10, 2, 5)[:, 0].unbind(0)[3]


def half_precision(x: Tensor) -> Tensor:
    return x.half()


def attention(x: Tensor) -> Tensor:
    q = x.view(1, 1, 10, 10)
    return F.scaled_dot_product_attention(q, q, q)


def attention_by_hand(x: Tensor) -> Tensor:
    return ((x @ x.T).softmax(-1)) @ x


def the_same_again(x: Tensor) -> Tensor:
    for _ in range(3):
        x = (x.T.reshape(10, 10) + 1).mul_(2).softmax(-1)
    return x


def linear(x: Tensor) -> Tensor:
    return F.linear(x, x[:3])


BY_HAND: list[tuple[Callable[[Tensor], Tensor], int]] = [
    (chain, 800), (both_in_use, 1200), (views, 400), (in_place, 400), (freed, 3200), (a_view_keeps_the_whole, 5200),
    (views_of_what_is_given, 0), (half_precision, 200), (attention, 400), (attention_by_hand, 800), (linear, 120),
    (the_same_again, 1200),
]  # fmt: skip


@pytest.mark.parametrize(("function", "expected"), BY_HAND, ids=lambda value: getattr(value, "__name__", str(value)))
def test_the_tally_is_the_sum_by_hand(function: Callable[[Tensor], Tensor], expected: int) -> None:
    """Also of real tensors: then the comparisons below compare the same."""
    given = torch.empty(10, 10, device="meta")
    expected += 4 * (function is freed)  # the sum itself
    assert peak_bytes(lambda: function(given)) == expected
    x = torch.ones(10, 10)
    assert real_peak_of(lambda: function(x)) == expected


def test_one_tally_knows_nothing_of_the_one_before() -> None:
    x = torch.empty(10, 10, device="meta")
    outside: list[Tensor] = []
    assert peak_bytes(lambda: outside.append(x + 1)) == 400
    assert peak_bytes(lambda: outside.append(outside[0] + 1)) == 400
    assert [peak_bytes(lambda: chain(x)) for _ in range(3)] == [800] * 3


def test_an_operator_that_is_known_is_not_run_again() -> None:
    """Its results are new tensors all the same; views are views, and other numbers or strides are another call."""
    ran: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is not torch.ops.aten.empty_strided.default:  # what is returned in place of a result
                ran.append(function.__name__)
            return function(*args, **(kwargs or {}))

    def run(*functions: Callable[[Tensor], Tensor]) -> list[Tensor]:
        ran.clear()
        x = torch.empty(4, 6, device="meta")
        with Watch(), KnownResults():  # the last one that is entered is asked first
            return [function(x) for function in functions]

    first, second = run(*[lambda x: x.softmax(-1)] * 2)
    assert ran == ["_softmax.default"]
    assert (second.shape, second.stride(), second.dtype) == (first.shape, first.stride(), first.dtype)
    assert second.untyped_storage()._cdata != first.untyped_storage()._cdata
    whole, again = run(*[lambda x: x.view(24)] * 2)
    assert ran == ["view.default"] * 2
    assert whole.untyped_storage()._cdata == again.untyped_storage()._cdata
    run(lambda x: x + 1, lambda x: x + 1.0, lambda x: x.add_(1), lambda x: x.add_(1))
    assert ran == ["add.Tensor"] * 2 + ["add_.Tensor"] * 2
    _, turned = run(lambda x: x.exp(), lambda x: x.transpose(0, 1).exp())
    assert ran == ["exp.default", "transpose.int", "exp.default"]
    assert turned.stride() == (1, 6)
    run(lambda x: torch.zeros(3), lambda x: torch.zeros(3))
    assert ran == ["zeros.default"] * 2, "of the CPU"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_flops_are_those_of_the_counter_of_torch(mode: Callable[[], Any]) -> None:
    """Of products, a convolution and attention, each of them twice."""

    def run(x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.conv2d(F.linear(x, x[0], x[0, 0])[:, None], x[:, None, :2, :2])[0] @ x[:, :5, :5]
            x = F.pad(F.scaled_dot_product_attention(x[None], x[None], x[None])[0], (0, 1, 0, 1))
        return x

    with mode(), FlopCounterMode(display=False) as expected:
        run(torch.ones(2, 6, 6, device="meta"))
    with mode(), KnownResults(), Flops(flop_registry) as counted:
        run(torch.ones(2, 6, 6, device="meta"))
    assert counted.by_operator == {str(operator): flops for operator, flops in expected.get_flop_counts()["Global"].items()}
    assert counted.by_operator.keys() == {"aten.addmm", "aten.bmm", "aten.convolution"}
