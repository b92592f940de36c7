"""The description of a model family: `Family`, and `Cascade` for what the cascade needs."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from scalediff.families.grid import AttentionSite, Grid, Layout, Role, UnknownLayout
from scalediff.families.packing import Form
from scalediff.families.rotation import TextRotation
from scalediff.settings import Preset

Arguments = Mapping[str, Any]
T = TypeVar("T")
BESIDE = "it runs beside a denoiser, whose family has the cascade"  # `no_cascade` of ControlNets


class Reader:
    """A cache of values read from tensors: a pipeline passes the same ids and masks at every step, and each read waits for the GPU."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], Any]] = {}

    def __call__(self, tensor: Tensor, function: Callable[..., T], *arguments: int) -> T:
        """`function(tensor, *arguments)`, cached by tensor and function as long as the tensor exists and is not modified."""
        if tensor.is_inference():  # it has no version counter, so a modification would go unnoticed
            return function(tensor, *arguments)
        key = (id(tensor), tensor._version, function, *arguments)
        known = self._known.get(key)
        if known is not None and known[0]() is tensor:
            value: T = known[1]
            return value
        if len(self._known) > 64:
            self._known = {k: v for k, v in self._known.items() if v[0]() is not None}
        value = function(tensor, *arguments)
        self._known[key] = (weakref.ref(tensor), value)
        return value


@dataclass(frozen=True)
class Cascade:
    """What the cascade needs to know about a family.

    Attributes:
        presets: Function from a denoiser to its presets by name. `"default"` always exists, `"paper"` if the paper has one.
        patch: Latents per token along an axis.
        size_multiple: Picture sides must be multiples of this number of pixels, and of the pixels per token.
        form: Form of the latents in the pipeline's steps, and of those that it returns.
        input_form: Form of the pipeline's argument `latents`; that of the steps when None.
        factor_of_token: Whether the pipeline's `vae_scale_factor` is the number of pixels per token instead of per latent.
        batch_norm_eps: What the pipeline adds to the variance of the autoencoder's batch norm; that of the autoencoder's config when None.
        guidance: Name of the pipeline's argument for the guidance scale, if its call has one.
        negative: Default negative prompt, for pipelines that apply guidance only if there is one.
        conditional: Which half of the batch that classifier-free guidance doubles is the conditional one, `"first"` or `"last"`; empty
            if guidance does not double the batch.
        batch_second: Names of the denoiser's arguments whose second axis is the batch.
        trained_size: Name of the pipeline's attribute for the size in pixels above which it rescales positions and attention. Windows
            have the trained size, so the cascade turns both off.
        call: Function from the height and width of a stage in pixels to arguments that the stage's call must have, of those that the
            pipeline knows: what else would make it draw another size, or another prompt in every stage.
        attributes: Function from a pipeline and the height and width of a stage to attributes of the pipeline, or of its parts by a dotted
            name, that the stage sets. They are restored after the run.
        largest_grid: Function from a denoiser to the largest token grid `(Y, X)` that it has positions for; None if there is no limit.
        tested: The models that the cascade was tested with, as text for the user.
        assumed: What is assumed about a pipeline of no known family, as text for the user; empty for known families.
    """

    presets: Callable[[nn.Module], Mapping[str, Preset]]
    patch: int = 2
    size_multiple: int = 1
    form: Form = "grid"
    input_form: Form | None = None
    factor_of_token: bool = False
    batch_norm_eps: float | None = None
    guidance: str = "guidance_scale"
    negative: str | None = None
    conditional: Literal["first", "last", ""] = ""
    batch_second: tuple[str, ...] = ()
    trained_size: str = ""
    call: Callable[[int, int], Mapping[str, Any]] = field(default=lambda height, width: {})
    attributes: Callable[[Any, int, int], Mapping[str, Any]] = field(default=lambda pipe, height, width: {})
    largest_grid: Callable[[nn.Module], Grid | None] = field(default=lambda denoiser: None)
    tested: str = "small models with random weights"
    assumed: str = ""

    @property
    def packed(self) -> bool:
        """Whether the steps' latents are tokens."""
        return self.form == "tokens"


def _no_layout(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    raise UnknownLayout(f"the family of {type(denoiser).__name__} has no layout")


def _no_rotation(denoiser: nn.Module) -> TextRotation | None:
    return None


@dataclass(frozen=True)
class Family:
    """One model family: what `patch_model` must know to recognise its denoisers, and where the tokens of their attention are.

    Attributes:
        denoiser: Class name of the denoiser.
        grid_source: Where `layout` reads the token grid from, as text for the report.
        text: How text enters the attention, as text for the report.
        native_grid: Function from a denoiser to the token grid `(Y, X)` that it was trained on, at its finest level; it returns None if
            the denoiser does not tell.
        layout: Function from a denoiser and the arguments of a forward pass to the layout of its tokens; raises `UnknownLayout`.
        roles: Pairs of a regular expression for module names and the role of those modules; the first match counts.
        role: Role of all other attention modules.
        level: Function from a denoiser and a module name to the number of times that the module's grid has been halved.
        rotation: Function from a denoiser to its rotary positions, if text is rotated for each window.
        cascade: What the cascade needs; None if only `patch_model` supports the family.
        no_cascade: Why the cascade does not support the family; empty if it does, or if denoisers of this class cannot be patched.
        refusal: Reason why denoisers of this class cannot be patched; empty if they can.
        refusal_error: Exception class raised with that reason.
        listed: Whether the attention modules are known in advance, as modules with a processor. For other models they are found when
            they call attention.
        module: Module that defines the class, or a package that contains it. A class of the same name elsewhere is another family.
        context_parallel: Whether text and image are separate up to their joint attention and diffusers' context parallelism splits both,
            so that Ulysses attention gathers them as a `Sequence` with shards.
        wraps: Whether windows may continue on the other side of the picture: the model has no positions, which end there.
        bands: Whether rows of the latents, the first argument of its forward, are mixed by self-attention, convolutions and group norms
            alone.
    """

    denoiser: str
    grid_source: str = ""
    text: str = ""
    native_grid: Callable[[nn.Module], Grid | None] = field(default=lambda denoiser: None)
    layout: Callable[[nn.Module, Arguments, Reader], Layout] = field(default=_no_layout)
    roles: tuple[tuple[str, Role], ...] = ()
    role: Role = "self"
    level: Callable[[nn.Module, str], int] = field(default=lambda denoiser, name: 0)
    rotation: Callable[[nn.Module], TextRotation | None] = _no_rotation
    cascade: Cascade | None = None
    no_cascade: str = ""
    refusal: str = ""
    refusal_error: type[Exception] = NotImplementedError
    listed: bool = True
    module: str = "diffusers"
    context_parallel: bool = False
    wraps: bool = False
    bands: bool = False

    def sites(self, denoiser: nn.Module) -> tuple[AttentionSite, ...]:
        """The attention modules of a denoiser; empty if the family is not listed."""
        if not self.listed:
            return ()
        found = []
        for name, module in denoiser.named_modules():
            if hasattr(module, "processor") and hasattr(module, "set_processor"):
                role = next((role for pattern, role in self.roles if re.search(pattern, name)), self.role)
                if role == "self" and getattr(module, "is_cross_attention", False) and module.added_kv_proj_dim is None:
                    role = "cross"
                found.append(AttentionSite(name, role, self.level(denoiser, name), find_obstacle(module)))
        return tuple(found)


_ATTENTION = {"scaled_dot_product_attention", "dispatch_attention_fn"}


def find_obstacle(attention: nn.Module) -> str:
    """Why the calls of an attention module cannot be intercepted, by the functions that its processor calls; empty if they can."""
    processor = type(attention.processor)
    calls = [cls.__dict__["__call__"] for cls in processor.__mro__ if "__call__" in cls.__dict__]
    if "AddedKV" in processor.__name__:
        return f"{processor.__name__} adds text to the keys of image self-attention"
    names = {name for call in calls for name in getattr(getattr(call, "__code__", None), "co_names", _ATTENTION)}
    return "" if names & _ATTENTION else f"{processor.__name__} does not call scaled_dot_product_attention"
