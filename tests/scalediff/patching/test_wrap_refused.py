"""Models, arguments and modules that cannot continue on the other side: the errors."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import scalediff
from bench.models.zoo import ZOO
from scalediff.patching.circular import check_convolutions, wrapped
from tests.conftest import state_of

X, BOTH = (False, True), (True, True)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    built: nn.Module = ZOO["SD1.5"].build()
    return built


@pytest.mark.parametrize("name", ["FLUX.1", "SD3", "PixArt"])
def test_models_with_positions_are_refused(name: str) -> None:
    model = ZOO[name].build()
    state = state_of(model)
    why = rf"wrap is for models without positions, .*: those of {type(model).__name__} end at the border .* got wrap=\(False, True\)"
    with pytest.raises(NotImplementedError, match=why):
        scalediff.patch_model(model, wrap=X)
    assert state_of(model) == state
    with scalediff.patch_model(model) as handle:
        with pytest.raises(NotImplementedError, match=why):
            handle.wrap = X
        assert handle.wrap == (False, False)


@pytest.mark.parametrize("wrap", ["x", True, (True,), (1, 0)])
def test_a_bad_wrap_is_named(unet: nn.Module, wrap: Any) -> None:
    with pytest.raises(TypeError, match=r"wrap must be a pair of booleans \(Y, X\), got wrap="):
        scalediff.patch_model(unet, wrap=wrap)
    with scalediff.patch_model(unet) as handle, pytest.raises(TypeError, match=r"wrap must be a pair of booleans"):
        handle.wrap = wrap


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), r"0 is a convolution with padding=\(1, 1\), padding_mode='reflect'"),
        (nn.Conv2d(1, 1, 3, padding="same"), r"0 is a convolution with padding='same', padding_mode='zeros'"),
        (nn.ConvTranspose2d(1, 1, 4, stride=2, padding=1), r"0 is a ConvTranspose2d, which pads"),
        (nn.Conv3d(1, 1, 3, padding=1), r"0 is a Conv3d, which pads"),
        (nn.ZeroPad2d(1), r"0 is a ZeroPad2d, which pads"),
        (type("KUpsample2D", (nn.Module,), {})(), r"0 is a KUpsample2D, which pads"),
    ],
)
def test_padding_that_cannot_wrap_is_named(module: nn.Module, why: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"wrap does not support Sequential: {why}, got wrap=\(True, True\)"):
        check_convolutions([nn.Sequential(module)], BOTH)
    check_convolutions([nn.Sequential(module)], (False, False))
    with pytest.raises(NotImplementedError, match="wrap does not support Sequential"), wrapped([nn.Sequential(module)], BOTH):
        pass
