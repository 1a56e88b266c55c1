"""The folded removal is the removal: same translations, in both precisions, for both removals and any translator."""

from __future__ import annotations

import pytest
import torch

from singreg.analysis.levels.pairs import EquivalentPairs
from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator
from tests.analysis.levels.level_data import World
from tests.reference import formulas


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_translations_are_those_through_the_null_projector(centred: bool, dtype: torch.dtype) -> None:
    world = World.make()
    mean = world.mean if centred else None
    z, z_eq = EquivalentPairs(world.translator, world.space, mean=mean)(world.features.to(dtype))
    truth = formulas.translations(world.features, world.weight, world.translator.matrix, world.translator.offset, mean)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(z.double(), torch.stack([first for first, _ in truth]), atol=tolerance, rtol=0)
    torch.testing.assert_close(z_eq.double(), torch.stack([second for _, second in truth]), atol=tolerance, rtol=0)
    assert (z - z_eq).abs().max() > 0.1
    assert z.dtype == z_eq.dtype == dtype


def test_nothing_is_lost_where_the_null_component_is_almost_everything() -> None:
    """Null components a thousand times the row-space ones: subtracting T(Π_n f) in float32 is the control that loses digits."""
    world = World.make()
    f = 1e-3 * world.space.remove(world.features) + 1e2 * world.space.component(world.features)
    truth = torch.stack([z for _, z in formulas.translations(f, world.weight, world.translator.matrix, world.translator.offset)])
    _, folded = EquivalentPairs(world.translator, world.space)(f)
    shift = world.space.component(f) @ world.translator.matrix.T
    control = world.translator(f) - shift
    errors = [float((found.double() - truth).abs().max()) for found in (folded, control)]
    assert errors[0] < 1e-4
    assert errors[1] > 2 * errors[0]


def test_widths_that_differ_are_refused() -> None:
    space = NullSpace.from_weight(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="takes 4 features and the head 5"):
        EquivalentPairs(LinearTranslator(torch.ones(3, 4), torch.zeros(3)), space)
    pairs = EquivalentPairs(LinearTranslator(torch.ones(3, 5), torch.zeros(3)), space)
    with pytest.raises(ValueError, match=r"features \(B, 5\), got \(2, 4\)"):
        pairs(torch.ones(2, 4))
