"""One pass over the pictures of a folder: all that the statistics need of each picture.

Legend: N pictures, C crops, D features, K classes, P patches, R rings of a spectrum.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.evaluate.folders import Folder, fitted, read_picture, resized, size_of
from bench.evaluate.networks import Clip, Inception
from bench.evaluate.protocols import Protocol
from bench.quality.metrics import count_discs, high_frequency_ratio, laplacian_pyramid, patches_at, radial_power, seam_score

PATCHES = 128  # of each level of each picture
SMALLEST = 16  # pixels per side that spectra and pyramids need
DEMO = "demo"  # the model whose pictures have discs to count


@dataclass
class Measured:
    """What is known of the pictures of a folder; a list has an entry for each picture."""

    numbers: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of statistics that are means over pictures
    controls: list[Tensor] = field(default_factory=list)  # [6] seam scores at the control periods
    radial: list[Tensor] = field(default_factory=list)  # [R] power spectra at the size of the comparison
    patches: defaultdict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))  # [P, 147] by level, at that size
    whole: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # [1, D] features and [1, K] logits of whole pictures
    crops: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # [C, D] and [C, K] of crops


@dataclass(frozen=True)
class Task:
    """What to measure."""

    compared: tuple[int, int] | None = None  # (height, width) at which spectra and patches are compared; None without a reference
    border: int | None = None  # pixels between borders of query patches; None if seams are not measured
    protocol: Protocol | None = None  # says which crops
    crops: bool = False  # whether crops are measured
    inception: Inception | None = None  # where its statistics are wanted, as the next
    clip: Clip | None = None


def measure(folder: Folder, task: Task, *, reference: bool = False) -> Measured:
    """Measure generated pictures, or those of the reference, which may be of any sizes; their HF ratio at the size of the comparison.

    Raises:
        ValueError: A picture is unreadable, of another size than the first, or smaller than a crop.
    """
    found, size = Measured(), None if reference else size_of(folder.files[0])
    with_crops = task.protocol is not None and task.crops and (task.protocol.crops_reference or not reference)
    for number, file in enumerate(folder.files):
        picture = read_picture(file, size=size)
        compared = None if task.compared is None else fitted(picture, task.compared)[None].float() / 255
        if compared is not None:
            _compare(found, compared, number)
        if not reference:
            _measure_alone(found, picture, folder, number, task)
        elif compared is not None:
            found.numbers["hf_ratio"].append(high_frequency_ratio(compared))
        if task.inception is not None:
            side = (task.inception.side, task.inception.side)
            found.whole.append(task.inception(resized(picture, side)[None]))
            if with_crops and task.protocol is not None:
                crops = random_crops(picture, file.name, task.protocol, count=len(folder), seed=number)
                found.crops.append(task.inception(torch.stack([resized(one, side) for one in crops] if task.protocol.resized else crops)))
    return found


def _compare(found: Measured, image: Tensor, number: int) -> None:
    """Spectrum and patches. Picture number i of every folder has its patches at the same places."""
    found.radial.append(radial_power(image)[0])
    generator = torch.Generator().manual_seed(number)
    for level in laplacian_pyramid(image):
        y, x = (torch.randint(0, n - 6, (1, PATCHES), generator=generator) for n in level.shape[2:])
        found.patches[min(level.shape[2:])].append(patches_at(level, y, x))


def _measure_alone(found: Measured, picture: Tensor, folder: Folder, number: int, task: Task) -> None:
    """What a generated picture shows without a reference."""
    image = picture[None].float() / 255
    if folder.seconds:
        found.numbers["seconds"].append(folder.seconds[number])
    found.numbers["hf_ratio"].append(high_frequency_ratio(image))
    if folder.run.get("model") == DEMO:
        found.numbers["discs"].append(float(count_discs(image)[0]))
    if task.border is not None:
        seam, *controls = seam_score(image, period=task.border).values()
        found.numbers["seam"].append(float(seam))
        found.controls.append(torch.tensor(controls, dtype=torch.float64))
    if task.clip is not None:
        cosine = float(task.clip(picture[None], [folder.prompts[number]])[0])
        found.numbers["clip"].append(100 * max(cosine, 0.0))


def random_crops(picture: Tensor, name: str, protocol: Protocol, *, count: int, seed: int) -> list[Tensor]:
    """The crops that a protocol takes from one of `count` `[3, Y, X]` pictures, at places drawn uniformly with the seed.

    Raises:
        ValueError: The picture is smaller than a crop, or the protocol's crops are not established.
    """
    each, side = protocol.crops_of(count), protocol.crop or 0
    if min(picture.shape[1:]) < side:
        raise ValueError(f"a picture must be as large as a crop, {side} x {side}, got {picture.shape[1]} x {picture.shape[2]} in {name}")
    generator = torch.Generator().manual_seed(seed)
    places = [[int(torch.randint(n - side + 1, (1,), generator=generator)) for n in picture.shape[1:]] for _ in range(each)]
    return [picture[:, y : y + side, x : x + side].contiguous() for y, x in places]
