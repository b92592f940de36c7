"""ScaleDiff in its authors' form computes what ours does, but for the work that its padded jitter adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="whole pictures need diffusers")

from bench.cascade import authors as cascade_authors
from bench.cascade.authors import Authors
from bench.models.zoo import ZOO
from scalediff.families import family_of
from scalediff.families.rotation import TextRotation
from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_stays")]


@pytest.fixture(scope="module")
def rotation() -> TextRotation:
    """That of FLUX."""
    denoiser = ZOO["FLUX.1"].build()
    family = family_of(denoiser)
    assert family is not None
    found = family.rotation(denoiser)
    assert found is not None
    return found


@pytest.mark.parametrize("offset", [(0, 0), (3, 1)])
@pytest.mark.parametrize(("grid", "window", "patch"), [((16, 8), (8, 8), (4, 4)), ((7, 11), (6, 4), (3, 2)), ((3, 12), (8, 8), (4, 4))])
def test_the_authors_form_is_ours(
    rotation: TextRotation, grid: tuple[int, int], window: tuple[int, int], patch: tuple[int, int], offset: tuple[int, int]
) -> None:  # fmt: skip
    """Ragged grids, windows over the grid; one patch to spare where there is an offset, and text rotated for every window."""
    offset = (offset[0] % patch[0], offset[1] % patch[1])
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, *grid, 2, rotation.channels, generator=rng, dtype=torch.float64) for _ in range(3))
    texts = [torch.randn(2, 5, 2, rotation.channels, generator=rng, dtype=torch.float64) for _ in range(3)]
    how: dict[str, Any] = {"window": window, "patch": patch}
    ours = {**how, "offset": offset, "impl": "reference"}
    authors = Authors(rotation, offset=offset if any(offset) else None)
    torch.testing.assert_close(authors.image(q, k, v, **how), neighborhood_patch_attention(q, k, v, **ours))
    rope = rotation.tables(grid, window, window, patch, offset)
    image, text = authors.joint(q, k, v, *texts, **how, text_rope=rope)
    expected_image, expected_text = joint_neighborhood_patch_attention(q, k, v, *texts, **ours, text_rope=rope)
    torch.testing.assert_close(image, expected_image, rtol=1e-5, atol=1e-5)  # their tables are fp32 where offsets change
    if any(offset) and any(-(-(n + o) // p) <= -(-n // p) for n, p, o in zip(grid, patch, offset, strict=True)):
        return  # a spare patch of nothing but padding is averaged into the text, which is theirs alone
    assert text is not None
    torch.testing.assert_close(text, expected_text, rtol=1e-5, atol=1e-5)


def test_padded_jitter_computes_a_patch_more_along_each_axis(rotation: TextRotation, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.56 times the windows at 2048 pixels, as published, and another offset in every call."""
    seen: list[int] = []
    sdpa = cascade_authors._sdpa

    def counted(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        seen.append(len(q))
        return sdpa(q, k, v, **how)

    q, k, v = (torch.randn(1, 8, 8, 1, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    how: dict[str, Any] = {"window": (4, 4), "patch": (2, 2)}
    monkeypatch.setattr(cascade_authors, "_sdpa", counted)
    jittered = Authors(rotation, jitter=True)
    results = [jittered.image(q, k, v, **how) for _ in range(8)]
    monkeypatch.undo()
    assert set(seen) == {25}
    assert len({float(x.sum()) for x in results}) > 1
    every = [neighborhood_patch_attention(q, k, v, **how, offset=(y, x)) for y in range(2) for x in range(2)]
    assert all(any(torch.allclose(x, one, atol=1e-6) for one in every) for x in results)


def test_other_rules_for_text_are_refused_by_the_authors_form(rotation: TextRotation) -> None:
    q = torch.zeros(1, 4, 4, 1, 16)
    text = torch.zeros(1, 2, 1, 16)
    with pytest.raises(ValueError, match="text_queries must be 'window', the authors' rule, got text_queries='global'"):
        Authors(rotation).joint(q, q, q, text, text, text, window=(2, 2), patch=(1, 1), text_queries="global")
