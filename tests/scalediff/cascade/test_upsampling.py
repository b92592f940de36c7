"""Upsamplers: the exact size, tiles that show no borders, files of weights and what is refused of them."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from scalediff.cascade.latents import encode
from scalediff.cascade.stage import make_reference
from scalediff.cascade.upsampling import (
    MARGIN,
    NetworkUpsampler,
    identify_upsampler,
    load_upsampler,
    resolve_upsampler,
    upsampled_picture,
)  # fmt: skip
from scalediff.settings import Settings
from tests.conftest import seeded


def nearest(x: Tensor, factor: int = 2) -> Tensor:
    return x.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def picture(*size: int) -> Tensor:
    return torch.rand(1, 3, *size, generator=seeded()) * 2 - 1


def test_without_an_upsampler_it_is_bicubic() -> None:
    x = picture(8, 12)
    assert torch.equal(upsampled_picture(x, (20, 31)), F.interpolate(x, size=(20, 31), mode="bicubic", align_corners=False))


@pytest.mark.parametrize(("factor", "size", "times"), [(2, (16, 24), 1), (2, (40, 60), 3), (4, (16, 24), 1), (3, (17, 25), 1)])
def test_the_size_is_exact_and_values_stay(factor: int, size: tuple[int, int], times: int) -> None:
    """A plane stays a plane; the network is applied until the picture is large enough; values outside are clamped before it."""
    calls: list[tuple[int, ...]] = []

    def network(x: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return nearest(x, factor)

    found = upsampled_picture(torch.full((2, 3, 8, 12), 1.5), size, network)
    assert found.shape == (2, 3, *size)
    assert len(calls) == times
    torch.testing.assert_close(found, torch.ones_like(found))
    x = picture(8, 12)
    if size == (16, 24) and factor == 2:
        torch.testing.assert_close(upsampled_picture(x, size, network), nearest(x))


def test_what_it_returns_must_be_larger_pictures() -> None:
    for wrong in (lambda x: x, lambda x: x[:, :1], lambda x: nearest(x)[0], lambda x: nearest(x)[..., :8, :]):
        with pytest.raises(ValueError, match=r"upsampler must return larger pictures \[B, 3, Y, X\] of \(1, 3, 8, 8\), got \("):
            upsampled_picture(picture(8, 8), (16, 16), wrong)
    with pytest.raises(TypeError, match="upsampler must return a tensor, got list"):
        upsampled_picture(picture(8, 8), (16, 16), lambda x: [x])


class Small(nn.Module):
    """Two convolutions and a pixel shuffle; a pixel sees 5 x 5 others."""

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3 * factor**2, 3, padding=1), nn.PixelShuffle(factor))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


@pytest.mark.parametrize("size", [(40, 70), (16, 16), (33, 90)])
def test_tiles_are_the_whole(size: tuple[int, int]) -> None:
    network, x = Small(), torch.rand(2, 3, *size, generator=seeded())
    seen: list[tuple[int, ...]] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[-2:])))
    found = NetworkUpsampler(network, 2, tile=16)(x)
    assert max(max(one) for one in seen) <= 16 + 2 * MARGIN
    with torch.no_grad():
        torch.testing.assert_close(found, network(x))
    half = NetworkUpsampler(network, 2, tile=None)(x.bfloat16())
    assert half.dtype == torch.bfloat16


def test_the_reference_of_a_stage_is_made_with_it(demo: Any) -> None:
    x, latents = picture(64, 64), torch.zeros(1, 4, 16, 16)
    with torch.no_grad():
        found = make_reference(demo, latents, x, (128, 128), Settings(lfm=False), nearest)
        torch.testing.assert_close(found, encode(demo, nearest(x)))


def test_the_cascade_uses_it(demo: Any) -> None:
    sizes: list[int] = []

    def network(x: Tensor) -> Tensor:
        sizes.append(x.shape[-1])
        return nearest(x)

    image = scalediff.upscale(demo, Image.new("RGB", (64, 64)), "a moon", height=72, width=72, steps=1, upsampler=network).images[0]
    assert (sizes, image.size) == ([64], (72, 72))


def test_another_upsampler_is_another_run(demo: Any, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"height": 72, "width": 72, "steps": 1, "workdir": tmp_path, "upsampler": Small()}
    scalediff.generate(demo, "a moon", generator=seeded(), **arguments)
    with pytest.raises(ValueError, match=r"belongs to another run \(upsampler: '"):
        scalediff.generate(demo, "a moon", generator=seeded(), **arguments | {"upsampler": nearest})
    other = Small()
    nn.init.zeros_(other.layers[0].weight)  # type: ignore[arg-type]
    assert identify_upsampler(other) != identify_upsampler(Small()) == identify_upsampler(Small())
    assert identify_upsampler(None) is None
    assert identify_upsampler(NetworkUpsampler(other, 2, fingerprint="abc")) == "abc"


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"upsampler must be a \.safetensors or \.pth file, got .*x\.onnx"):
        load_upsampler(tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"upsampler must be an existing file, got .*x\.pth"):
        load_upsampler(tmp_path / "x.pth")
    page = b"<!DOCTYPE html><html></html>"  # what a failed download may leave
    for name, content, why in [("a.pth", page, "torch cannot read weights from it"), ("b.safetensors", page, ""), ("c.pth", b"", "")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"upsampler must be a readable file of weights, got .*{name}: {why}"):
            load_upsampler(tmp_path / name)
    torch.save([1], tmp_path / "d.pth")
    with pytest.raises(ValueError, match=r"upsampler must be a file of weights by name, got .*d\.pth with a list"):
        load_upsampler(tmp_path / "d.pth")


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit",)


def test_a_file_cannot_run_code(tmp_path: Path) -> None:
    file = tmp_path / "e.pth"
    torch.save({"weight": Evil()}, file)
    with pytest.raises(ValueError, match="it holds more than weights"):
        load_upsampler(file)
    file.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="it holds more than weights"):
        load_upsampler(file)


class _Unsupported(Exception):
    pass


class _Single(SimpleNamespace):
    def eval(self) -> Any:
        return self

    def to(self, device: Any) -> Any:
        return self

    def __call__(self, x: Tensor) -> Tensor:
        return nearest(x, self.scale)


def pretend(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    """A module `spandrel` whose loader finds this network, or raises it."""

    class Loader:
        def load_from_state_dict(self, weights: Any) -> Any:
            if isinstance(found, Exception):
                raise found
            return found

    tiling = SimpleNamespace(SUPPORTED=1, INTERNAL=2)
    names = {"ModelLoader": Loader, "canonicalize_state_dict": dict, "UnsupportedModelError": _Unsupported}
    module: Any = SimpleNamespace(**names, ImageModelDescriptor=_Single, ModelTiling=tiling)
    monkeypatch.setitem(sys.modules, "spandrel", module)


def network(**changes: Any) -> Any:
    return _Single(**{"purpose": "SR", "input_channels": 3, "output_channels": 3, "scale": 4, "tiling": 1} | changes)


REFUSED = [
    (_Unsupported(), "upsampler must be weights of an architecture that spandrel knows, got "),
    (KeyError("conv"), "upsampler must be complete weights of one network, got "),
    (network(purpose="Restoration"), "upsampler must be a network for super-resolution of a single picture, got "),
    (SimpleNamespace(purpose="Inpainting"), "upsampler must be a network for super-resolution of a single picture, got "),
    (network(input_channels=1), "upsampler must map pictures of 3 channels to 3 channels, got "),
    (network(scale=1), "upsampler must enlarge pictures, got "),
]


@pytest.mark.parametrize(("found", "message"), REFUSED)
def test_networks_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Any, message: str) -> None:
    pretend(monkeypatch, found)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load_upsampler(tmp_path / "x.pth")


def test_a_network_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "x.pth")
    for tiling, tile in ((1, 256), (2, None)):
        pretend(monkeypatch, network(tiling=tiling))
        found: Any = resolve_upsampler(str(tmp_path / "x.pth"))
        assert (found.factor, found.tile, len(found.fingerprint)) == (4, tile, 16)
        assert found(torch.rand(1, 3, 5, 7)).shape == (1, 3, 20, 28)
    assert resolve_upsampler(None) is None
    assert resolve_upsampler(nearest) is nearest


def test_without_spandrel_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ImportError, match=r'needs spandrel: pip install "scalediff\[upsampler\]"'):
        load_upsampler(tmp_path / "x.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_real_architecture_of_spandrel(tmp_path: Path, suffix: str) -> None:
    """A small ESRGAN with random weights, written to a file: the network that was written answers."""
    spandrel = pytest.importorskip("spandrel")
    from safetensors.torch import save_file
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(0)
    written = ESRGAN(in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=4).eval()
    file = tmp_path / f"x{suffix}"
    state = {name: value.contiguous() for name, value in written.state_dict().items()}
    (save_file if suffix == ".safetensors" else torch.save)(state, file)
    found, x = load_upsampler(file), torch.rand(1, 3, 24, 20, generator=seeded())
    with torch.no_grad():
        torch.testing.assert_close(found(x), written(x).clamp(0, 1))
    torch.save({"unknown.weight": torch.zeros(3)}, tmp_path / "y.pth")
    with pytest.raises(ValueError, match="upsampler must be weights of an architecture that spandrel knows"):
        load_upsampler(tmp_path / "y.pth")
    assert issubclass(spandrel.UnsupportedModelError, Exception)
