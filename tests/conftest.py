"""Shared fixtures: the embedded model, as it is and with fewer channels, loaded once and handed out unpatched."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.util
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scalediff

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported; without a GPU they run in Python


torch.set_num_threads(1)  # the models are small: threads cost more than they bring, above all beside other work
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a background job: what tests start would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What is imported by now lives as long as the process: the garbage collector need not look through it at every turn."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # for what extensions check at the end of the process


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which may be missing
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`-n` means `--dist worksteal`: neighbouring tests share fixtures and caches, and no worker waits for another's long test."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def _interpreter_does_nothing_twice() -> Iterator[None]:
    """Triton's interpreter replaces the builtins of `triton.language` again at every call of a device function: up to half its time.

    It also makes its table of dtypes again at every look-up, wraps the numbers of the shape of every result, and computes for every sum
    and product of integers whether it overflows, which nothing then reads: half of what is left.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.language.core import tensor
    from triton.runtime import interpreter

    original, launch, replaced = interpreter._patch_lang, interpreter.GridExecutor.__call__, dict[frozenset[int], Any]()
    dtype_of, dtypes = interpreter._get_np_dtype, dict[str, Any]()
    begin, shapes = tensor.__init__, dict[tuple[int, ...], tuple[Any, Any]]()

    @functools.cache
    def languages(function: Any) -> frozenset[int]:
        return frozenset(id(value) for value in function.__globals__.values() if value is interpreter.tl or value is interpreter.tl.core)

    def once(function: Any) -> Any:
        key = languages(function)
        if key not in replaced:
            replaced[key] = original(function)
        return replaced[key]

    def looked_up(kind: Any) -> Any:
        if kind.name not in dtypes:
            dtypes[kind.name] = dtype_of(kind)
        return dtypes[kind.name]

    def begun(self: Any, handle: Any, kind: Any) -> None:
        shape = tuple(kind.shape) if kind.is_block() else ()
        if shape in shapes:
            self.handle, self.type, self.dtype = handle, kind, kind.scalar
            self.shape, self.numel = shapes[shape]
        else:
            begin(self, handle, kind)
            shapes[shape] = self.shape, self.numel

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_patch_lang", once)
        patched.setattr(interpreter, "_get_np_dtype", looked_up)
        patched.setattr(tensor, "__init__", begun)
        patched.setattr(interpreter.GridExecutor, "__call__", launched)
        options = interpreter.interpreter_builder.options
        if not options.debug:  # else the overflow is an error
            patched.setattr(interpreter.interpreter_builder, "options", dataclasses.replace(options, sanitize_overflow=False))
        yield


@pytest.fixture(scope="session", autouse=True)
def _autoencoders_are_counted_once() -> Iterator[None]:
    """Every stage of a run counts the memory of its autoencoder, to know whether it needs tiles: a sixth of a small run.

    Here once for each class, for the pictures are small; always where a test has replaced the memory that there is.
    """
    from scalediff.cascade import memory, run
    from scalediff.methods import running

    count, total, known = memory.needs_tiling, memory.total_bytes, set[type]()

    def counted(pipe: Any, size: tuple[int, int], batch: int, *, ranks: int = 1) -> bool:
        kind = type(pipe.vae)
        if kind in known and memory.total_bytes is total:
            return False
        known.add(kind)
        return count(pipe, size, batch, ranks=ranks)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "needs_tiling", counted)
        patched.setattr(running, "needs_tiling", counted)
        yield


def _loaded(**networks: Any) -> Any:
    """The embedded pipeline, in which the named networks are made again with other configurations and random weights.

    Their weights have values of bfloat16 and of fp16, so that tests may convert a network and back.
    """
    pytest.importorskip("diffusers", reason="the picture-making path needs diffusers")
    pipe = scalediff.load_demo()
    pipe.set_progress_bar_config(disable=True)
    for name, channels in networks.items():
        network = getattr(pipe, name)
        torch.manual_seed(0)
        setattr(pipe, name, type(network).from_config({**network.config, **channels}).eval().bfloat16().half().float())
    pipe("", num_inference_steps=1, output_type="latent", generator=seeded())  # the first call adds attributes to the pipeline
    return pipe


@pytest.fixture(scope="session")
def _demo() -> Any:
    unet, vae = {"block_out_channels": (16, 32)}, {"block_out_channels": (8, 16, 16), "norm_num_groups": 4}
    return _loaded(unet=unet, vae=vae)


@pytest.fixture
def demo(_demo: Any) -> Iterator[Any]:
    """The embedded model's architecture with a quarter of the channels and random weights: less time. Unpatched again after the test."""
    yield _demo
    scalediff.unpatch_model(_demo)


@pytest.fixture(scope="session")
def _trained_demo() -> Any:
    return _loaded()


@pytest.fixture
def trained_demo(_trained_demo: Any) -> Iterator[Any]:
    """The embedded pipeline as it is, for what pictures show and what is counted by hand; unpatched again after the test."""
    yield _trained_demo
    scalediff.unpatch_model(_trained_demo)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def unet(demo: Any) -> Iterator[nn.Module]:
    yield demo.unet
    scalediff.unpatch_model(demo.unet)


def forward(unet: nn.Module, size: tuple[int, int], *, batch: int = 2, seed: int = 0) -> Tensor:
    rng = seeded(seed)
    x, text = torch.randn(batch, 4, *size, generator=rng), torch.randn(batch, 24, 64, generator=rng)
    with torch.no_grad():
        out: Tensor = unet(x, 500, encoder_hidden_states=text).sample
    return out


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind, in comparable form."""
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    return {name: (type(m), sorted(m.__dict__), {h: dict(m.__dict__[h]) for h in hooks}) for name, m in module.named_modules()}
