"""What each of several processes computes of drawn problems whose rows are shared out among them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from scalediff_kernels.distributed import losses, merge
from scalediff_kernels.distributed.api import sharded_joint_neighborhood_patch_attention, sharded_neighborhood_patch_attention
from scalediff_kernels.distributed.bands import convolve_band, gather_bands, normalise_band
from scalediff_kernels.distributed.geometry import owned_rows
from scalediff_kernels.distributed.groups import check_agreement, groups_of
from tests.kernels.neighborhood.problems import Problem


@dataclass(frozen=True)
class Shared:
    """A problem, and the numbers of rows of all ranks."""

    problem: Problem
    rows: tuple[int, ...]


def draw(seed: int, ranks: int) -> Shared:
    """Any split of the rows: equal, uneven, or a row or two a rank, fewer than a patch has."""
    rng = random.Random(seed)
    most = rng.choice([2, 5, 12])
    rows = [most] * ranks if rng.random() < 0.3 else [rng.randint(1, most) for _ in range(ranks)]
    axes = []
    for length in (sum(rows), rng.randint(1, 7)):
        window = rng.randint(1, length + 3)
        patch = rng.randint(1, window)
        axes.append((length, window, patch, rng.randrange(patch)))
    groups, text = rng.choice([1, 2]), rng.choice([0, 1, 3, 7])
    problem = Problem(
        *zip(*axes, strict=True),  # type: ignore[arg-type]
        dim=8,
        batch=rng.choice([1, 1, 2]),
        heads=groups * rng.choice([1, 2]),
        groups=groups,
        text=text,
        rope=text > 0 and rng.random() < 0.5,
        rule=rng.choice(["window", "global", None]) if text else None,
        scale=rng.choice([None, None, 0.7, -0.4, 0.0]),
        layout=rng.choice(["contiguous", "sequence"]),
        dtype=rng.choice([torch.float64, torch.float64, torch.bfloat16]),
    )
    return Shared(problem, tuple(rows))


def solve(shared: Shared, group: Any) -> dict[str, Any]:
    """This rank's rows of the image, the text, and the bytes that it received."""
    own, problem = owned_rows(shared.rows)[distributed.get_rank(group)], shared.problem
    q, k, v, *text = (x.cpu() for x in problem.inputs())
    mine = [x[:, own.start : own.stop] for x in (q, k, v)]
    how: dict[str, Any] = without_wrap(problem) | {"group": group, "rows": shared.rows}
    counted, merged = Counted(), None
    with counted:
        if text:
            how |= {"text_rope": problem.tables(), "text_queries": problem.rule}
            image, merged = sharded_joint_neighborhood_patch_attention(*mine, *text, **how)
        else:
            image = sharded_neighborhood_patch_attention(*mine, **how)
    return {"image": image, "text": merged, "rows": counted.rows, "merged": counted.merged}


def without_wrap(problem: Problem) -> dict[str, Any]:
    """The arguments of a problem for grids that are shared out, which do not wrap."""
    return {name: value for name, value in problem.arguments.items() if name != "wrap"}


class Counted:
    """Count the bytes that this rank receives: as rows, and to merge text."""

    def __enter__(self) -> None:
        self.rows = self.merged = 0
        self._before = distributed.batch_isend_irecv, distributed.all_to_all_single, merge.all_gather
        point_to_point, shares, gathered = self._before

        def counted_messages(operations: Any) -> Any:
            self.rows += sum(operation.tensor.nbytes for operation in operations if operation.op is distributed.irecv)
            return point_to_point(operations)

        def counted_shares(output: Tensor, x: Tensor, group: Any) -> Any:
            ranks = distributed.get_world_size(group)
            self.merged += output.nbytes * (ranks - 1) // ranks
            return shares(output, x, group=group)

        def counted_gather(output: Tensor, x: Tensor, group: Any) -> None:
            self.merged += output.nbytes - x.nbytes
            gathered(output, x, group)

        distributed.batch_isend_irecv = counted_messages
        distributed.all_to_all_single, merge.all_gather = counted_shares, counted_gather

    def __exit__(self, *error: object) -> None:
        distributed.batch_isend_irecv, distributed.all_to_all_single, merge.all_gather = self._before


def drawn(seeds: range) -> dict[int, Any]:
    """Problems of four ranks and, for every other seed, of two pairs of ranks at once."""
    pairs = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    found = {}
    with torch.no_grad():
        for seed in seeds:
            by_two = seed % 2 == 1
            group = pairs[distributed.get_rank() // 2] if by_two else distributed.group.WORLD
            found[seed] = solve(draw(seed, 2 if by_two else 4), group)
    return found


def agreed() -> list[str]:
    """What is raised where ranks differ in a version, in a shape, in one half of a mesh, and in nothing."""
    rank, said = distributed.get_rank(), []
    world, mesh = distributed.group.WORLD, init_device_mesh("cpu", (2, 2), mesh_dim_names=("guidance", "rows"))
    cases: list[tuple[Any, dict[str, str]]] = [
        (world, {"torch": f"2.{rank // 2}"}),
        (world, {"shape": "8 x 8" if rank != 3 else "8 x 6", "seed": "0"}),
        (groups_of(mesh), {"seed": str(rank == 3)}),
        ((mesh.get_group("rows"), mesh.get_group("guidance")), {"seed": str(rank == 3)}),
        (mesh.get_group("rows"), {"seed": str(rank == 3)}),
        (groups_of(mesh), {"seed": "0"}),
    ]
    for group, facts in cases:
        try:
            check_agreement(group, facts)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


CONVOLUTIONS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "3 x 3": (3, 6, {"padding": 1}),
    "stride 2": (3, 6, {"padding": 1, "stride": 2}),
    "1 x 1": (1, 3, {}),
    "stride and padding by axis": (3, 4, {"padding": (1, 2), "stride": (2, 1)}),
    "5 x 5, dilated": (5, 4, {"padding": 4, "dilation": 2, "groups": 2}),
}


def picture(rows: int) -> Tensor:
    return torch.randn(2, 4, 4 * rows, 5, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)


def kernel(size: int, groups: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(size)
    return torch.randn(6, 4 // groups, size, size, generator=rng, dtype=torch.float64), torch.randn(6, generator=rng, dtype=torch.float64)


def bands() -> dict[str, Any]:
    """Bands of convolutions, of a group norm, and the gathered picture; and what is refused."""
    rank, world, found = distributed.get_rank(), distributed.group.WORLD, {}
    for name, (size, rows, how) in CONVOLUTIONS.items():
        band = picture(rows)[:, :, rank * rows : (rank + 1) * rows]
        found[name] = convolve_band(band, *kernel(size, how.get("groups", 1)), **how, group=world)
    weight, band = picture(3)[0, :, 0, 0], picture(6)[:, :, 6 * rank : 6 * rank + 6]
    found["norm"] = normalise_band(3 * band + 100, 2, weight, -weight, 1e-3, group=world)
    found["plain norm"] = normalise_band(band.bfloat16(), 4, group=world)
    found["gathered"] = gather_bands(band, world)
    refused: dict[str, dict[str, Any]] = {"padding": {"padding": 0}, "same": {"padding": "same"}, "stride": {"padding": 1, "stride": 4}}
    for name, how in refused.items():
        try:
            convolve_band(band, *kernel(3, 1), **how, group=world)
        except (NotImplementedError, ValueError) as error:
            found[name] = str(error)
    return found


def refused() -> dict[str, str]:
    """What is raised for arguments that do not fit the group."""
    world = distributed.group.WORLD
    q = torch.zeros(1, 2, 4, 1, 8)
    image: dict[str, Any] = {"group": world, "rows": (2, 2, 2, 2), "window": (4, 4), "patch": (2, 2)}
    tables = (torch.ones(1, 2, 4), torch.zeros(1, 2, 4))
    cases: dict[str, Any] = {
        "rows": image | {"rows": (2, 2)},
        "empty": image | {"rows": (2, 2, 0, 2)},
        "shape": image | {"rows": (1, 3, 1, 3)},
        "gradients": image,
        "mesh": image | {"group": init_device_mesh("cpu", (2, 2), mesh_dim_names=("guidance", "rows"))},
        "group": image | {"group": "all"},
        "member": image | {"group": distributed.new_group([0, 1]), "rows": (2, 2)},
        "part": image | {"group": DeviceMesh("cpu", [0, 1]), "rows": (2, 2)},
        "tables": image | {"text_rope": tables},
        "rule": image | {"text_queries": "all"},
    }
    said = dict[str, str]()
    try:
        said["parts"] = str(len(groups_of(DeviceMesh("cpu", [[0], [1]]))))
    except ValueError as error:
        said["parts"] = str(error)
    for name, how in cases.items():
        text = (q[:, 0],) * 3 if name in ("tables", "rule") else ()
        attend: Any = sharded_joint_neighborhood_patch_attention if text else sharded_neighborhood_patch_attention
        try:
            attend(q.requires_grad_(name == "gradients"), q, q, *text, **how)
            said[name] = ""
        except (ValueError, TypeError, NotImplementedError) as error:
            said[name] = str(error)
    return said


def several(seeds: range) -> dict[str, Any]:
    return {"drawn": drawn(seeds), "agreed": agreed(), "refused": refused(), "bands": bands(), "failing": failing()}


def lost(doing: str, end: Callable[[], None]) -> None:
    """Repeat what is done over ranks until one of them has ended."""
    world, rank = distributed.group.WORLD, distributed.get_rank()
    problem = Problem((16, 4), (6, 4), (2, 2), (0, 0), 8)
    q, k, v = (x[:, 4 * rank : 4 * rank + 4].cpu() for x in problem.inputs())
    band = picture(3)[:, :, 3 * rank : 3 * rank + 3]
    for step in range(1000):
        if step == 5:
            end()
        if doing == "attention":
            sharded_neighborhood_patch_attention(q, k, v, group=world, rows=(4,) * 4, **without_wrap(problem))
        elif doing == "convolution":
            convolve_band(band, *kernel(3, 1), padding=1, group=world)
        elif doing == "text":
            merge.merge_sums(q[:, 0], 1, q.dtype, world)
        elif doing == "gathering":
            gather_bands(band, world)
        else:
            check_agreement(world, {"step": str(step)})


def failing() -> dict[str, str]:
    """What is raised where a collective or messages fail though no rank has ended, and of errors that are none of the connection."""
    said, world = dict[str, str](), distributed.group.WORLD
    failures = {"backend": (RuntimeError, ()), "peers": (RuntimeError, (1, 2)), "memory": (torch.OutOfMemoryError, ()),
                "missing": (NotImplementedError, ()), "kernel": (torch.AcceleratorError, ())}  # fmt: skip
    for name, (kind, peers) in failures.items():
        try:
            with losses.naming_losses(world, "gathering", peers=peers):
                raise kind("timed out")
        except RuntimeError as error:
            said[name] = f"{type(error).__name__} {error} {error.__cause__}"
    losses.check_losses(world, "running the model", RuntimeError("another error"))
    return said
