"""Natural twins against a loop over all pairs, and what they say of a classifier that cannot tell classes apart."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from singreg.analysis.pixels.twins import natural_twins


def test_twins_are_those_of_a_loop_over_all_pairs() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    logits, z = torch.randn(30, 4, generator=g) + 2 * torch.eye(3, 4)[labels], torch.randn(30, 5, generator=g)
    found = natural_twins(logits, z, labels, shown=100)

    def far(i: int, j: int) -> float:
        cos = float(z[i].double() @ z[j].double() / (z[i].double().norm() * z[j].double().norm()))
        return math.degrees(math.acos(cos))

    pairs = list(itertools.combinations(range(30), 2))
    distance = {(i, j): float((logits[i] - logits[j]).double().abs().max()) for i, j in pairs}
    same = sorted(distance[p] for p in pairs if labels[p[0]] == labels[p[1]])
    other = [p for p in pairs if labels[p[0]] != labels[p[1]]]
    close = same[(len(same) - 1) // 2]  # torch's median is the lower of the two middle ones
    angles = sorted(far(*p) for p in other)
    limit = angles[(len(angles) - 1) // 2]
    wanted = {p for p in other if distance[p] <= close + 1e-6 and far(*p) >= limit - 1e-9}
    assert found.pairs == len(other)
    assert found.rate == pytest.approx(len(wanted) / len(other), abs=1.1 / len(other))
    assert found.touched == pytest.approx(len({i for p in wanted for i in p}) / 30, abs=0.07)
    assert {(t.first, t.second) for t in found.shown} <= wanted
    used = [i for t in found.shown for i in (t.first, t.second)]
    assert len(used) == len(set(used))
    ranks = [t.logit_distance for t in found.shown]
    assert ranks == sorted(ranks)
    assert found.shown[0].logit_distance == pytest.approx(min(distance[p] for p in wanted), abs=1e-5)


def test_a_classifier_that_tells_classes_apart_has_no_twins_and_one_that_cannot_has_many() -> None:
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(40) % 4
    z = torch.randn(40, 6, generator=g)
    noise = torch.randn(40, 4, generator=g)
    apart = natural_twins(noise + 100 * torch.eye(4)[labels], z, labels)
    blind = natural_twins(noise, z, labels)
    assert (apart.rate, apart.shown) == (0.0, [])
    assert blind.rate > 0.15
    # Larger logits alone change nothing: the limit grows with them.
    assert natural_twins(1000 * noise, z, labels).rate == pytest.approx(blind.rate, abs=1e-9)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(np.zeros(4), "at least two classes"), (np.arange(4), "two pictures of one"), (np.zeros(3), "as many logits")],
)
def test_what_cannot_have_twins_is_refused(labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        natural_twins(torch.randn(4, 2), torch.randn(4, 3), torch.from_numpy(labels).long())
