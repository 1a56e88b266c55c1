"""A small head, two alike translators and random features to steer; processes import this too."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.features import FeatureBatch
from singreg.analysis.steering import PairPlan, plan_pairs, steer_pairs
from singreg.analysis.steering_curves import equal_effort, measure_curves, natural_marks
from singreg.nullspace import NullSpace
from singreg.steering import ConditionalGaussian
from singreg.translator import LinearTranslator

C, M, N, COUNT = 4, 12, 7, 11
STEPS, RADII = [0.0, 0.1, 0.3, 0.8], [0.9, 1.2, 2.0, 5.0]
NAMES = ["ant", "bee", "cat", "dog"]
TARGETS = ["bee", "cat", "a red hat"]


@dataclass
class SteeringWorld:
    """Images with labels, class and target prompts, two translators, and the Gaussian of the features."""

    weight: Tensor
    translators: dict[str, LinearTranslator]
    features: Tensor
    labels: Tensor
    texts: Tensor
    plan: PairPlan
    gaussian: ConditionalGaussian
    natural: dict[str, Any]

    @classmethod
    def make(cls, seed: int = 0, **plan: Any) -> "SteeringWorld":
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        weight, (one, noise) = draw(C, M), draw(2, N, M)
        translators = {"one": LinearTranslator(one, draw(N)), "two": LinearTranslator(one + 0.6 * noise, draw(N))}
        features, labels = draw(COUNT, M) + 0.5, torch.arange(COUNT) % C
        texts = normalize(draw(C, N), dim=1)
        wanted = torch.cat([texts[1:3], normalize(draw(1, N), dim=1)])
        made = plan_pairs(labels.numpy(), NAMES, texts, [0, 2, 3], TARGETS, wanted, **plan)
        root, space = draw(M, M), NullSpace.from_weight(weight)
        gaussian = ConditionalGaussian.from_moments(features.mean(0), root @ root.T / M, space)
        median, p95, p99 = gaussian.radius(features).quantile(torch.tensor([0.5, 0.95, 0.99]).double()).tolist()
        natural = {"median": median, "p95": p95, "p99": p99}
        return cls(weight, translators, features, labels, texts, made, gaussian, natural)

    @property
    def space(self) -> NullSpace:
        return NullSpace.from_weight(self.weight)

    def batches(self, size: int = 4, rank: int = 0, world: int = 1) -> list[FeatureBatch]:
        """The images of one of `world` processes."""
        f, z, mine = self.features, torch.zeros(COUNT, N), torch.arange(rank, COUNT, world).split(size)
        return [FeatureBatch(f[rows], f[rows] @ self.weight.T, z[rows], self.labels[rows], rows) for rows in mine]

    def grid(self, budget: str) -> list[float]:
        return STEPS if budget == "step" else sorted({*RADII, *natural_marks(self.natural).values()})

    def curves(
        self, batches: list[FeatureBatch] | None = None, attackers: Any = None, judges: Any = None
    ) -> list[dict[str, Any]]:
        attackers = attackers or self.translators
        some, judges = self.batches() if batches is None else batches, judges or attackers
        judges = {(name, ""): each for name, each in judges.items()}
        attacks = equal_effort(attackers, self.space, self.gaussian, self.natural, STEPS, RADII)
        how: dict[str, Any] = {"weight": self.weight, "null_space": self.space}
        return measure_curves(some, self.plan, attacks, judges, **how)

    def pairs(self, batches: list[FeatureBatch] | None = None, **changes: Any) -> list[dict[str, Any]]:
        options = {"null_space": self.space, "attackers": self.translators, **changes}
        some = self.batches() if batches is None else batches
        return steer_pairs(some, self.plan, weight=self.weight, **options)


def shared(rank: int, world: int, stride: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Curves and pairs over several processes; with stride 1 all but the first have no images."""
    made = SteeringWorld.make(images_per_source=2)
    mine = made.batches(2, rank, stride) if rank < stride else []
    return made.curves(mine), made.pairs(mine)
