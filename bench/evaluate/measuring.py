"""One pass over the pictures of a folder: all that the statistics need of each picture.

Legend: N pictures, C crops, D features, K classes, P patches, R rings of a spectrum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bench.evaluate.folders import Folder, read_picture
from bench.evaluate.networks import Clip, Inception
from bench.evaluate.protocols import Protocol
from bench.quality.metrics import count_discs, high_frequency_ratio, laplacian_pyramid, patches_at, radial_power, seam_score
from scalediff.cascade.metadata import read_metadata

PATCHES = 128  # of each level of each picture
DEMO = "demo"  # the model whose pictures have discs to count
BICUBIC = Image.Resampling.BICUBIC
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """What to score."""

    wanted: Sequence[str] = ()  # of NETWORK_STATISTICS
    protocol: Protocol | None = None  # says which crops; the statistics of crops need it
    inception: Inception | None = None  # where its statistics are wanted, as the next
    clip: Clip | None = None
    draws: int = 100  # of the bootstrap
    splits: int = 10  # of the Inception score
    force: bool = False  # compute FID of fewer pictures than features
    device: torch.device = CPU  # of the computations with features, in fp64

    @property
    def crops(self) -> Protocol | None:
        """The protocol, where statistics of crops are wanted."""
        return self.protocol if any(name.endswith("_patch") for name in self.wanted) else None


@dataclass
class Measured:
    """What is known of the pictures of a folder; a list has an entry for each picture."""

    numbers: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of statistics that are means over pictures
    controls: list[Tensor] = field(default_factory=list)  # [6] seam scores at the control periods
    radial: list[Tensor] = field(default_factory=list)  # [R] power spectra at the size of the comparison
    patches: defaultdict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))  # [P, 3, 7, 7] by level, at that size
    # [C, D] features and [C, K] logits: of whole pictures, where C is 1, under "", and of crops under "_patch"
    features: defaultdict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))


def measure(folder: Folder, compared: tuple[int, int] | None, options: Options, *, reference: bool = False) -> Measured:
    """Measure generated pictures, or those of the reference, which may be of any sizes; of these the HF ratio as they are compared.

    Args:
        folder: The pictures.
        compared: (height, width) at which spectra and patches are compared; None without a reference.
        options: What is wanted.
        reference: Whether the pictures are those of the reference.

    Raises:
        ValueError: A picture is unreadable, or smaller than a crop.
    """
    found = Measured()
    for number, file in enumerate(folder.files):
        picture = read_picture(file)
        if compared is not None:
            image = batch_of(ImageOps.fit(picture, compared[::-1], BICUBIC)).float() / 255
            _compare(found, image, number)
            if reference:
                found.numbers["hf_ratio"].append(high_frequency_ratio(image))
        if not reference:
            _measure_alone(found, picture, folder, number, options)
        if options.inception is not None:
            sizes = (options.inception.side, options.inception.side)
            found.features[""].append(options.inception(batch_of(picture.resize(sizes, BICUBIC))))
            if options.crops and (options.crops.crops_reference or not reference):
                crops = random_crops(picture, file.name, options.crops, count=len(folder), seed=number)
                resized = [crop.resize(sizes, BICUBIC) for crop in crops] if options.crops.resized else crops
                found.features["_patch"].append(options.inception(batch_of(*resized)))
    return found


def _compare(found: Measured, image: Tensor, number: int) -> None:
    """Spectrum and patches. Picture number i of every folder has its patches at the same places."""
    found.radial.append(radial_power(image)[0])
    generator = torch.Generator().manual_seed(number)
    for level in laplacian_pyramid(image):
        y, x = (torch.randint(0, n - 6, (1, PATCHES), generator=generator) for n in level.shape[2:])
        found.patches[min(level.shape[2:])].append(patches_at(level, y, x))


def _measure_alone(found: Measured, picture: Image.Image, folder: Folder, number: int, options: Options) -> None:
    """What a generated picture shows without a reference."""
    pixels, border = batch_of(picture), folder.run.get("patch_border", 0)
    image = pixels.float() / 255
    found.numbers["hf_ratio"].append(high_frequency_ratio(image))
    if folder.run:
        record = read_metadata(folder.files[number])
        found.numbers["seconds"].append(record["seconds"])
        if options.clip is not None:
            found.numbers["clip"].append(100 * max(float(options.clip(pixels, [record["prompt"]])[0]), 0.0))
    if folder.run.get("model") == DEMO:
        found.numbers["discs"].append(float(count_discs(image)[0]))
    if border >= 16 and min(picture.size) >= 2 * round(1.25 * border):  # what a seam score needs
        seam, *controls = seam_score(image, period=border).values()
        found.numbers["seam"].append(float(seam))
        found.controls.append(torch.tensor(controls, dtype=torch.float64))


def random_crops(picture: Image.Image, name: str, protocol: Protocol, *, count: int, seed: int) -> list[Image.Image]:
    """The crops that a protocol takes from one of `count` pictures, at places drawn uniformly with the seed.

    Raises:
        ValueError: The picture is smaller than a crop, or the protocol's crops are not established.
    """
    each, side = protocol.crops_of(count), protocol.crop or 0
    if min(picture.size) < side:
        raise ValueError(f"a picture must be as large as a crop, {side} x {side}, got {picture.height} x {picture.width} in {name}")
    generator = torch.Generator().manual_seed(seed)
    sizes = (picture.height, picture.width)
    places = [[int(torch.randint(n - side + 1, (1,), generator=generator)) for n in sizes] for _ in range(each)]
    return [picture.crop((x, y, x + side, y + side)) for y, x in places]


def batch_of(*pictures: Image.Image) -> Tensor:
    """`[B, 3, Y, X]` uint8."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
