"""The patch beside what people do with a diffusers model: choose a backend, cache it, batch it, share it between threads.

Compiling, adapting, offloading and saving have files of their own, which share the helpers here.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from tests.conftest import seeded, state_of

diffusers = pytest.importorskip("diffusers", reason="what is composed with are diffusers' features")

from diffusers.hooks import FirstBlockCacheConfig  # noqa: E402
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error:scalediff")  # no warning of ours in any of these tests

SDPA = F.scaled_dot_product_attention
NATIVE, GRID = (4, 4), (8, 6)
ROOT = Path(__file__).resolve().parents[3]
patch = functools.partial(scalediff.patch_model, window=WINDOW)


@pytest.fixture(autouse=True)
def _places_are_given_back() -> Iterator[None]:
    """Attention and diffusers' backends are the original ones after every test; the chosen backend is put back."""
    backends, active = dict(_AttentionBackendRegistry._backends), _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(active)
    assert F.scaled_dot_product_attention is SDPA
    assert _AttentionBackendRegistry._backends == backends


@functools.cache
def plain_and_patched(name: str) -> tuple[Tensor, Tensor]:
    model = ZOO[name].build()
    plain = ZOO[name].run(model, GRID)
    with patch(model):
        patched = ZOO[name].run(model, GRID)
    assert_differs(patched, plain)
    return plain, patched


def assert_close(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def assert_differs(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() > 1e-3 * other.abs().max()


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested inputs, every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: changed(part, change) for key, part in value.items()}
    return type(value)(changed(part, change) for part in value) if isinstance(value, list | tuple) else value


def in_order(model: nn.Module, feature: Callable[[], Any], patch_first: bool) -> scalediff.Handle:
    if patch_first:
        handle = patch(model)
        feature()
        return handle
    feature()
    return patch(model)


either_order = pytest.mark.parametrize("patch_first", [True, False], ids=["patched first", "patched second"])


# Backends of diffusers' dispatcher


def chosen(model: Any, backend: str, how: str) -> AbstractContextManager[Any]:
    if how == "context":
        return attention_backend(backend)  # type: ignore[no-any-return]
    model.set_attention_backend(backend)
    return nullcontext()


@pytest.mark.composes("attention backends", "network")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("how", ["model", "context"])
@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
def test_a_chosen_backend_is_patched(backend: str, how: str) -> None:
    model, (plain, patched) = ZOO["FLUX.1"].build(), plain_and_patched("FLUX.1")
    with chosen(model, backend, how):
        before, native = (ZOO["FLUX.1"].run(model, grid) for grid in (GRID, NATIVE))
        assert_close(before, plain)
        with patch(model):
            assert_close(ZOO["FLUX.1"].run(model, GRID), patched)
            assert torch.equal(ZOO["FLUX.1"].run(model, NATIVE), native)
        assert torch.equal(ZOO["FLUX.1"].run(model, GRID), before)


@pytest.mark.parametrize("chosen_first", [True, False])
def test_a_backend_that_never_calls_sdpa_gets_what_is_not_windowed(chosen_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def by_hand(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append(query.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.FLEX, by_hand)
    model, (plain, patched) = ZOO["FLUX.1"].build(), plain_and_patched("FLUX.1")
    in_order(model, lambda: model.set_attention_backend("flex"), not chosen_first)
    assert_close(ZOO["FLUX.1"].run(model, GRID), patched)
    assert calls == []
    ZOO["FLUX.1"].run(model, NATIVE)
    assert calls == [6 + 16] * 3
    scalediff.unpatch_model(model)
    assert_close(ZOO["FLUX.1"].run(model, GRID), plain)
    assert calls[3:] == [6 + 48] * 3


# Caches, batches, callbacks, threads


@either_order
@pytest.mark.parametrize("jitter", ["none", "alternate"])
def test_first_block_cache_of_a_patched_model(jitter: Any, patch_first: bool) -> None:
    model = ZOO["FLUX.1"].build()

    def steps() -> Tensor:
        outs = []
        for step in range(4):
            with model.cache_context("cond"):
                outs.append(ZOO["FLUX.1"].run(model, GRID, seed=step))
        return torch.stack(outs)

    def cached(threshold: float) -> Tensor:
        if not patch_first:
            model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        with patch(model, jitter=jitter):
            if patch_first:
                model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
            out = steps()
        model.disable_cache()
        return out

    plain = steps()
    with patch(model, jitter=jitter):
        patched = steps()
    assert torch.equal(cached(0.0), patched)
    skipping = cached(1e9)
    assert torch.equal(skipping[0], patched[0])
    assert_differs(skipping[1:], patched[1:])
    assert torch.equal(steps(), plain)


@pytest.mark.composes("doubled batch of guidance", "network")
@pytest.mark.parametrize("name", ["SD1.5", "SD3", "FLUX.1", "Qwen-Image", "Lumina 2", "Z-Image"])
def test_a_batch_for_guidance_is_two_single_passes(name: str) -> None:
    """Prompts are of different length in Qwen-Image, Lumina 2 and Z-Image."""
    model = ZOO[name].build()
    both = ZOO[name].inputs(Draw(0), GRID, 2)

    def alone(index: int) -> Any:
        one = changed(both, lambda x: x[index : index + 1] if len(x) == 2 else x)
        return one | {key: value[index : index + 1] for key, value in both.items() if isinstance(value, list)}

    def run(inputs: Any) -> Tensor:
        with torch.no_grad():
            out = model(**inputs, return_dict=False)[0]
        return torch.stack(list(out))

    plain = run(both)
    with patch(model):
        together = run(both)
        for index in range(2):
            assert_close(run(alone(index))[0], together[index])
    assert_differs(together, plain)
    assert torch.equal(run(both), plain)


class Stopped(Exception):
    """Raised by a callback."""


def test_a_callback_may_read_change_and_stop_the_steps_of_a_cascade(demo: Any) -> None:
    size = {"height": 128, "width": 96, "num_inference_steps": 3, "output_type": "latent"}
    seen: list[tuple[int, ...]] = []

    def draw(change: Callable[[Tensor], Tensor]) -> Tensor:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append(tuple(tensors["latents"].shape[-2:]))
            assert F.scaled_dot_product_attention is SDPA
            return {"latents": change(tensors["latents"])}

        out: Tensor = demo("a moon", generator=seeded(), callback_on_step_end=callback, **size).images
        return out

    def stop(latents: Tensor) -> Tensor:
        if latents.shape[-2:] == (32, 24):
            raise Stopped
        return latents

    with scalediff.patch_model(demo) as handle:
        kind, state, scheduler = type(demo), state_of(demo.unet), demo.scheduler
        out = demo("a moon", generator=seeded(), **size).images
        assert torch.equal(draw(lambda latents: latents), out)
        assert len(seen) > 3
        assert seen[0] != seen[-1] == (32, 24)
        assert_differs(draw(lambda latents: latents * 0.5), out)
        with pytest.raises(Stopped):
            draw(stop)
        assert (handle.active, handle.attention, type(demo), demo.scheduler) == (True, "npa", kind, scheduler)
        assert state_of(demo.unet) == state
        assert F.scaled_dot_product_attention is SDPA
        assert torch.equal(demo("a moon", generator=seeded(), **size).images, out)


@pytest.mark.composes("threads", "network")
def test_threads_do_not_meet_in_each_others_attention() -> None:
    """Two patched models and one that is not, at once: each computes what it computes alone."""
    models = {name: ZOO[name].build() for name in ("SD1.5", "FLUX.1", "SD3")}
    expected = {name: plain_and_patched(name)[1] for name in ("SD1.5", "FLUX.1")} | {"SD3": plain_and_patched("SD3")[0]}
    start, right = threading.Barrier(3), Counter[str]()

    def work(name: str) -> None:
        start.wait()
        right[name] = sum(torch.equal(ZOO[name].run(models[name], GRID), expected[name]) for _ in range(8))

    with patch(models["SD1.5"]), patch(models["FLUX.1"]):
        threads = [threading.Thread(target=work, args=(name,)) for name in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert right == dict.fromkeys(models, 8)


@pytest.mark.parametrize("where", ["transformer_blocks.0.attn", "single_transformer_blocks.1", "proj_out"])
def test_an_exception_in_the_middle_of_a_pass_leaves_nothing_behind(where: str) -> None:
    model, (plain, patched) = ZOO["FLUX.1"].build(), plain_and_patched("FLUX.1")
    backends = dict(_AttentionBackendRegistry._backends)

    def stop(*_: object) -> None:
        assert F.scaled_dot_product_attention is not SDPA
        raise Stopped

    with patch(model):
        hook = model.get_submodule(where).register_forward_hook(stop)
        with pytest.raises(Stopped):
            ZOO["FLUX.1"].run(model, GRID)
        hook.remove()
        assert F.scaled_dot_product_attention is SDPA
        assert _AttentionBackendRegistry._backends == backends
        assert torch.equal(ZOO["FLUX.1"].run(model, GRID), patched)
    assert torch.equal(ZOO["FLUX.1"].run(model, GRID), plain)


# What shares a name


@pytest.mark.slow
def test_a_package_named_kernels_is_not_hidden(tmp_path: Path) -> None:
    package = tmp_path / "kernels" / "__init__.py"
    package.parent.mkdir()
    package.write_text("def get_kernel(*args, **kwargs): raise RuntimeError('nothing is fetched')\n")
    script = """
import kernels, scalediff, scalediff_kernels
from bench.models.zoo import ZOO, WINDOW
model = ZOO["FLUX.1"].build()
plain = ZOO["FLUX.1"].run(model, (8, 6))
with scalediff.patch_model(model, window=WINDOW):
    print((ZOO["FLUX.1"].run(model, (8, 6)) - plain).abs().max() > 1e-3 * plain.abs().max())
print(kernels.__file__)
"""
    paths = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["tensor(True)", str(package)]
