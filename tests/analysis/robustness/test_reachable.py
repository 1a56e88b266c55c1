"""What null directions can reach at all: the limit against brute force, and heads with a small null space."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.old_robustness.attacks import MAXIMISER, Grids, Outsider, adaptive_name, transfer_name
from singreg.analysis.old_robustness.measure import usual_attacks
from singreg.analysis.old_robustness.reachable import Reach, reachable_targets
from singreg.analysis.old_robustness.results import RobustnessFigures
from singreg.maximiser import Directions, Maximiser
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator
from tests.analysis import toy
from tests.analysis.robustness import robust
from tests.analysis.robustness.test_robustness import Broken, failed, other_model


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def narrow() -> Classifier:
    """The toy with so many classes that 4 null dimensions are left of its 24, as 24 are of 1,024 with 1,000 classes."""
    return toy.classifier(classes=toy.WIDTH - 4)


def measure(**changes: Any) -> RobustnessFigures:
    return robust.measure(classifier=narrow(), near_ratios=(), **changes)


def test_the_limit_is_that_of_brute_force() -> None:
    """No point of z + V has a larger cosine, and points of V alone do not either where the best lies at infinity."""
    basis = torch.linalg.qr(seeded(0, 6, 2)).Q
    z, text = seeded(1, 8, 6), normalize(seeded(2, 8, 6), dim=-1)
    best = torch.cosine_similarity(Reach(basis).limit(z, text), text)
    scales = torch.tensor([0.1, 1.0, 10.0, 100.0, 1e5], dtype=torch.float64).repeat(4000)
    tried = seeded(3, len(scales), 2) * scales[:, None] @ basis.T
    reached = torch.stack([torch.cosine_similarity(row + tried, t[None], dim=-1).max() for row, t in zip(z, text, strict=True)])
    assert bool((reached <= best + 1e-4).all())
    assert bool((best <= reached + 0.02).all())
    inside = (text @ basis) @ basis.T
    rest = z - (z @ basis) @ basis.T
    assert 0 < int(((rest * text).sum(1) > 0).sum()) < 8  # both kinds were there
    assert float(inside.norm(dim=1).min()) > 0


def test_the_maximiser_reaches_the_limit_that_the_oracle_names() -> None:
    space, t = NullSpace.from_weight(seeded(4, 20, 24)), LinearTranslator(seeded(5, 6, 24).float(), seeded(6, 6).float())
    f, text = seeded(7, 10, 24), normalize(seeded(8, 10, 6), dim=-1)
    step = Maximiser(Directions(space), matrix=t.matrix, offset=t.offset)
    u = step.unbounded(f, text)
    assert u is not None
    assert step.reach is not None
    moved = f + step.reach.to_features(u)
    wanted = Reach.of(t, space).limit(f @ t.matrix.double().T + t.offset.double(), text)
    torch.testing.assert_close(moved @ t.matrix.double().T + t.offset.double(), wanted, rtol=1e-6, atol=1e-6)
    assert Maximiser(Directions(space), translator=t).unbounded(f, text) is None


def test_a_sound_attack_passes_on_a_small_null_space_and_a_wrong_sign_one_does_not() -> None:
    found = measure()
    assert found.nullity == 4
    assert all(share is not None and 0.05 < share < 0.99 for share in found.reachable.values())  # what the old rule asked for is not there
    assert found.limit_success == {"one": 1.0, "two": 1.0}
    assert not failed(found)
    assert "that can be reached at all" in found.checks[0].found
    space, options = NullSpace.from_weight(narrow().weight), robust.OPTIONS
    kind = usual_attacks(robust.translators(), narrow().weight.detach(), space, Grids(options.grid(), limit=options.limit), {}, options)[0]
    broken = [Broken(a, "wrong sign") if (a.name, a.crafted_on) == (MAXIMISER, "one") else a for a in kind if "near" not in a.name]
    assert "success goes to 100 % as the budget grows" in failed(measure(attacks=broken))


def test_targets_no_feature_reaches_are_known() -> None:
    flat = LinearTranslator(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), torch.zeros(3))
    texts = normalize(torch.tensor([[1.0, 0.0, 0.1], [0.8, 0.1, 2.0], [0.0, 1.0, 0.0]]), dim=-1)
    assert reachable_targets(flat, texts) == {0, 2}  # the middle one points out of the plane; within it the first is nearer
    assert reachable_targets(lambda f: f, texts) == {0, 1, 2}  # nobody knows of a network


def test_success_of_transfer_needs_the_logits_and_what_only_keeps_the_decision_is_apart() -> None:
    theirs = Outsider(robust.translators()["two"], other_model(0.3)[0])
    loose, tight = (
        robust.measure(outsiders={"pretrained": theirs}, near_ratios=(), logit_tolerance=tolerance) for tolerance in (1e9, 0.05)
    )
    for name in (transfer_name("pretrained"), adaptive_name("pretrained")):
        wide, narrow_one = (found.curve(name, judge="one") for found in (loose, tight))
        assert wide.figures["success"] == wide.figures["decision_success"] == narrow_one.figures["decision_success"]
        assert max(wide.logit_change) > 0.05
        assert narrow_one.figures["success"][-1] < wide.figures["success"][-1]
        assert max(value or 0 for value in wide.figures["success"]) > 0.3
    own = tight.curve(MAXIMISER, crafted_on="one", judge="one")
    assert own.figures["success"] == own.figures["decision_success"]
    assert np.isfinite(own.area["decision_success"][1])
    assert tight.logit_tolerance == 0.05
