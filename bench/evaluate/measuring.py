"""One pass over the pictures of a folder: all that the statistics need of each picture.

Legend: N pictures, C crops, D features, K classes, P patches, R rings of a spectrum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.evaluate.folders import Folder, fitted, read_picture, resized, size_of
from bench.evaluate.networks import FeatureNetwork, TextNetwork
from bench.evaluate.protocols import Protocol
from bench.quality.metrics import count_discs, high_frequency_ratio, laplacian_pyramid, patches_at, radial_power, seam_score

PATCHES = 128  # of each level of each picture
SMALLEST = 16  # pixels per side that spectra and pyramids need
DEMO = "demo"  # the model whose pictures have discs to count


@dataclass
class Measured:
    """What is known of the pictures of a folder; a list has an entry for each picture.

    Attributes:
        numbers: `[N]` by the name of a statistic that is a mean over pictures.
        controls: `[6]` seam scores at the control periods.
        radial: `[R]` power spectra at the size of the comparison.
        patches: By level, `[P, 147]` patches of the Laplacian pyramid at that size.
        whole: `[1, D]` features and `[1, K]` logits of whole pictures.
        crops: `[C, D]` and `[C, K]` of crops.
    """

    numbers: dict[str, list[float]] = field(default_factory=dict)
    controls: list[Tensor] = field(default_factory=list)
    radial: list[Tensor] = field(default_factory=list)
    patches: dict[int, list[Tensor]] = field(default_factory=dict)
    whole: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    crops: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """What to measure.

    Attributes:
        compared: (height, width) at which spectra and patches are compared with the reference; None without a reference.
        border: Pixels between borders of query patches; None if seams are not measured.
        protocol: Says which crops.
        crops: Whether crops are measured.
        inception, clip: The networks, where their statistics are wanted.
    """

    compared: tuple[int, int] | None = None
    border: int | None = None
    protocol: Protocol | None = None
    crops: bool = False
    inception: FeatureNetwork | None = None
    clip: TextNetwork | None = None


def measure(folder: Folder, task: Task) -> Measured:
    """Measure generated pictures.

    Raises:
        ValueError: A picture is unreadable, of another size than the first, or smaller than a crop.
    """
    found, size = Measured(), size_of(folder.files[0])
    if folder.seconds:
        found.numbers["seconds"] = folder.seconds
    for number, file in enumerate(folder.files):
        picture = read_picture(file, size=size)
        _measure_alone(found, picture, task, discs=folder.run.get("model") == DEMO)
        _measure_compared(found, picture, number, task)
        _measure_features(found, picture, file.name, number, task, with_crops=task.crops, count=len(folder))
        if task.clip is not None:
            cosine = float(task.clip(picture[None], [folder.prompts[number]])[0])
            found.numbers.setdefault("clip", []).append(100 * max(cosine, 0.0))
    return found


def measure_reference(folder: Folder, task: Task) -> Measured:
    """Measure reference pictures, which may be of any sizes; their HF ratio at the size of the comparison. Raises as `measure`."""
    found, with_crops = Measured(), task.crops and task.protocol is not None and task.protocol.crops_reference
    for number, file in enumerate(folder.files):
        picture = read_picture(file)
        _measure_compared(found, picture, number, task)
        if task.compared is not None:
            image = fitted(picture, task.compared)[None].float() / 255
            found.numbers.setdefault("hf_ratio", []).append(high_frequency_ratio(image))
        _measure_features(found, picture, file.name, number, task, with_crops=with_crops, count=len(folder))
    return found


def _measure_alone(found: Measured, picture: Tensor, task: Task, *, discs: bool) -> None:
    image = picture[None].float() / 255
    found.numbers.setdefault("hf_ratio", []).append(high_frequency_ratio(image))
    if discs:
        found.numbers.setdefault("discs", []).append(float(count_discs(image)[0]))
    if task.border is not None:
        seam, *controls = seam_score(image, period=task.border).values()
        found.numbers.setdefault("seam", []).append(float(seam))
        found.controls.append(torch.tensor(controls, dtype=torch.float64))


def _measure_compared(found: Measured, picture: Tensor, number: int, task: Task) -> None:
    """Spectrum and patches at the size of the comparison. Picture number i of every folder has its patches at the same places."""
    if task.compared is None:
        return
    image = fitted(picture, task.compared)[None].float() / 255
    found.radial.append(radial_power(image)[0])
    generator = torch.Generator().manual_seed(number)
    for level in laplacian_pyramid(image):
        y, x = (torch.randint(0, n - 6, (1, PATCHES), generator=generator) for n in level.shape[2:])
        found.patches.setdefault(min(level.shape[2:]), []).append(patches_at(level, y, x))


def _measure_features(found: Measured, picture: Tensor, name: str, number: int, task: Task, *, with_crops: bool, count: int) -> None:
    network = task.inception
    if network is None:
        return
    side = (network.side, network.side)
    found.whole.append(network(resized(picture, side)[None]))
    if with_crops and task.protocol is not None:
        crops = random_crops(picture, name, task.protocol, count=count, seed=number)
        found.crops.append(network(torch.stack([resized(crop, side) for crop in crops] if task.protocol.resized else crops)))


def random_crops(picture: Tensor, name: str, protocol: Protocol, *, count: int, seed: int) -> list[Tensor]:
    """The crops that a protocol takes from one of `count` `[3, Y, X]` pictures, at places drawn uniformly with the seed.

    Raises:
        ValueError: The picture is smaller than a crop, or the protocol's crops are not established.
    """
    each, side = protocol.crops_of(count), protocol.crop or 0
    if min(picture.shape[1:]) < side:
        raise ValueError(f"a picture must be as large as a crop, {side} x {side}, got {picture.shape[1]} x {picture.shape[2]} in {name}")
    generator = torch.Generator().manual_seed(seed)
    places: Sequence[list[int]] = [
        [int(torch.randint(n - side + 1, (1,), generator=generator)) for n in picture.shape[1:]] for _ in range(each)
    ]
    return [picture[:, y : y + side, x : x + side].contiguous() for y, x in places]
