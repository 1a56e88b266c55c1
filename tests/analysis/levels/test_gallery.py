"""Nearest pictures against a loop over the gallery, without the picture itself, in chunks; a gallery that is too small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from singreg.analysis.levels import gallery as module
from singreg.analysis.levels.gallery import Gallery, nearest_pictures
from singreg.analysis.levels.image_results import PictureShift
from singreg.analysis.levels.pairs import EquivalentPairs
from tests.analysis.levels.level_data import NumberedPart, World
from tests.reference import formulas


def make_gallery(count: int = 23, *, prefix: str = "gallery") -> Gallery:
    embeddings = np.random.default_rng(5).normal(size=(count, 7)).astype(np.float32)
    return Gallery(NumberedPart(np.full(count, -1), 1, prefix), embeddings)


def expected(z: torch.Tensor, gallery: Gallery, k: int, without: bytes) -> list[tuple[int, float]]:
    found = [(formulas.degrees(z, torch.from_numpy(row)), place) for place, row in enumerate(gallery.embeddings)]
    kept = [(place, degrees) for degrees, place in sorted(found) if bytes(gallery.part.digests[place]) != without]
    return kept[:k]


@pytest.mark.parametrize("chunk", [4096, 5, 1])
@pytest.mark.parametrize("prefix", ["gallery", "picture"])
def test_nearest_pictures_are_those_of_the_loop_and_never_the_picture_itself(
    chunk: int, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prefix "picture" the gallery holds the very pictures that are looked for."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    world, gallery = World.make(), make_gallery(prefix=prefix)
    pairs = EquivalentPairs(world.translator, world.space)
    indices = [4, 0, 17]
    gallery.embeddings[4] = world.translator(world.features[4]).numpy()  # the nearest of all, were it not itself
    steered = world.features[indices] + world.space.component(torch.ones(12))
    found = nearest_pictures(world.features[indices], indices, world.part, gallery, pairs=pairs, k=3, steered=steered)
    truth = formulas.translations(world.features, world.weight, world.translator.matrix, world.translator.offset)
    for shift, index, moved in zip(found, indices, world.translator(steered), strict=True):
        assert (shift.index, shift.image) == (index, f"picture-{index}")
        assert shift.steered is not None
        for neighbours, z in ((shift.before, truth[index][0]), (shift.after, truth[index][1]), (shift.steered, moved)):
            wanted = expected(z, gallery, 3, bytes(world.part.digests[index]))
            assert [(n.index, n.image) for n in neighbours] == [(place, f"{prefix}-{place}") for place, _ in wanted]
            assert [n.angle for n in neighbours] == pytest.approx([degrees for _, degrees in wanted], abs=1e-4)
    assert (found[0].before[0].index == 4) == (prefix == "gallery")


def test_a_memory_mapped_gallery_works_and_json_changes_nothing(tmp_path: Path) -> None:
    world, gallery = World.make(), make_gallery()
    np.save(tmp_path / "z.npy", gallery.embeddings)
    mapped = Gallery(gallery.part, np.load(tmp_path / "z.npy", mmap_mode="r"))
    pairs = EquivalentPairs(world.translator, world.space, mean=world.mean)
    (found,) = nearest_pictures(world.features[:1], [0], world.part, mapped, pairs=pairs, k=2)
    assert found == nearest_pictures(world.features[:1], [0], world.part, gallery, pairs=pairs, k=2)[0]
    assert found.steered is None
    assert PictureShift.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_a_gallery_smaller_than_k_is_refused_and_the_picture_itself_does_not_count() -> None:
    world, same, other = World.make(), make_gallery(5, prefix="picture"), make_gallery(5)
    pairs = EquivalentPairs(world.translator, world.space)
    for gallery, k, fits in ((other, 5, True), (other, 6, False), (same, 4, True), (same, 5, False), (other, 0, False)):
        if fits:
            (found,) = nearest_pictures(world.features[2:3], [2], world.part, gallery, pairs=pairs, k=k)
            assert len(found.before) == k
            continue
        own = "" if gallery is other else ", 1 of them the picture itself"
        with pytest.raises(ValueError, match=f"{k} nearest pictures were asked of the gallery 'test', which has 5{own}: ask for fewer"):
            nearest_pictures(world.features[2:3], [2], world.part, gallery, pairs=pairs, k=k)


def test_shapes_that_do_not_fit_are_refused() -> None:
    world, gallery = World.make(), make_gallery()
    pairs = EquivalentPairs(world.translator, world.space)
    with pytest.raises(ValueError, match=r"has 23 pictures and embeddings \(22, 7\)"):
        Gallery(gallery.part, gallery.embeddings[:22])
    with pytest.raises(ValueError, match=r"queries \(Q, 6\)"):
        nearest_pictures(world.features[:1], [0], world.part, Gallery(gallery.part, gallery.embeddings[:, :6]), pairs=pairs)
    with pytest.raises(ValueError, match="2 pictures need features"):
        nearest_pictures(world.features[:1], [0, 1], world.part, gallery, pairs=pairs)
    with pytest.raises(ValueError, match=r"steered ones of the same shape.*\(2, 12\)"):
        nearest_pictures(world.features[:1], [0], world.part, gallery, pairs=pairs, steered=world.features[:2])
