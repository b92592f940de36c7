"""The evaluation protocols of the papers, by name: what each does, what its numbers are biased to, and what is not established."""

from __future__ import annotations

from dataclasses import dataclass, replace

BASE = 1024  # pixels per side of the base models' native pictures

_SINGULAR = "whole-image FID of fewer than 2,048 pictures: too large by an amount that falls with the number of pictures"
_UNCROPPED = "whole-image columns: 299 pixels per side remain, so fine detail does not count"
_WHOLE_REFERENCE = (
    "patch columns: crops of generated pictures against whole photos, so crops that look like complete pictures, with repeated small "
    "subjects, score better than true detail"
)
_RESIZE = "the resize to 299 pixels (library, antialias): here it is Pillow's bicubic with antialias"
_CLIP = "the CLIP network"
_MOST = "most papers of this kind have 1,000 prompts of LAION-5B and as many of its photos"


@dataclass(frozen=True)
class Protocol:
    """One protocol; None for a number that is not established."""

    source: str  # the papers
    data: str  # prompts and references
    unknown: tuple[str, ...]  # what is not established about it
    references: int | None = None  # number of reference pictures
    crops: int | None = 10  # of each picture; None too where `total` says it
    crop: int | None = BASE  # pixels per side of a crop
    total: int | None = None  # crops in all, spread evenly over the pictures
    resized: bool = True  # whether crops are resized to 299 pixels
    crops_reference: bool = False  # whether the reference is cropped too; otherwise its whole pictures are the reference of the crops

    def crops_of(self, pictures: int) -> int:
        """Crops of each of so many pictures, rounded up where `total` says how many in all; ValueError where it is not established."""
        if self.total is not None:
            return -(-self.total // pictures)
        if self.crops is None or self.crop is None:
            raise ValueError(f"number and size of this protocol's crops are not established ({self.source}): pass --crops and --crop-size")
        return self.crops

    def with_crops(self, crops: int | None, crop: int | None) -> Protocol:
        """The protocol with so many crops of each picture, and of another size; None leaves its own."""
        return replace(self, crops=crops or self.crops, total=None if crops else self.total, crop=crop or self.crop)


PROTOCOLS = {
    "scalediff": Protocol(
        "ScaleDiff, arXiv:2510.25818, Table 1: FID, KID, IS, FIDp, KIDp, ISp, CLIP",
        "1,000 pairs of LAION-5B: their captions are the prompts, their photos the reference",
        ("the number of crops: here it is AccDiffusion's, whose protocol the paper follows", "which 1,000 pairs", "KID's subset size",
         _RESIZE, _CLIP),
        references=1000,
    ),
    "accdiffusion": Protocol(
        "AccDiffusion, ECCV 2024 (v2: arXiv:2412.02099): FID, KID, IS; of crops FIDc, KIDc, ISc",
        "LAION-5B; 10,000 reference photos", ("the number of prompts, and which photos", _RESIZE), references=10_000,
    ),
    "rectifiedhr": Protocol(
        "RectifiedHR, arXiv:2503.02537: FID, KID, IS; of crops FIDc, KIDc, ISc; CLIP", _MOST, ("prompts and references", _RESIZE, _CLIP),
    ),
    "freescale": Protocol("FreeScale, ICCV 2025: FID, KID, IS; of crops FIDc, KIDc", _MOST, ("prompts and references", _RESIZE)),
    "fam": Protocol(
        "FAM Diffusion, CVPR 2025: FIDc and KIDc of 10 random crops", "real pictures",
        ("whether the reference is cropped: here it is not", _RESIZE),
    ),
    "lsrna": Protocol(
        "LSRNA, arXiv:2503.18446: FID and pFID", 'captions of OpenImages by BLIP-2; real pictures, ">3K"',
        ('whether ">3K" is the number or the side of the real pictures', _RESIZE), crops=None, total=50_000, crops_reference=True,
    ),
    "hiflow": Protocol(
        "HiFlow, NeurIPS 2025: FID, IS; of local patches FIDp, ISp; CLIP", "unknown", ("number and size of the patches", _RESIZE, _CLIP),
        crops=None, crop=None,
    ),
    "pixelrush": Protocol(
        "PixelRush, arXiv:2602.12769: FID and IS of crops without resize", "unknown", ("the number of crops", _RESIZE),
        crops=None, crop=299, resized=False,
    ),
}  # fmt: skip


def described(name: str, protocol: Protocol) -> str:
    """In Markdown: what a protocol does, its biases, and what is not established."""
    number = f"{protocol.total} in all" if protocol.total else f"{protocol.crops} of each picture" if protocol.crops else "number unknown"
    crop = f"{protocol.crop} x {protocol.crop} pixels" if protocol.crop else "size unknown"
    side = "crops of the reference pictures" if protocol.crops_reference else "whole reference pictures"
    resize = "resized to 299" if protocol.resized else "not resized"
    biases = [_SINGULAR, _UNCROPPED] + [_WHOLE_REFERENCE] * (not protocol.crops_reference)
    return "\n".join([
        f"Protocol `{name}`: {protocol.source}.",
        "",
        f"- crops: {number}, {crop}, at random places, {resize}, compared with {side}",
        f"- data: {protocol.data}; references: {protocol.references or 'number unknown'}",
        *(f"- biased: {bias}" for bias in biases),
        *(f"- not established: {one}" for one in protocol.unknown),
    ])  # fmt: skip
