"""What steering can reach at all: an affine translator of f + d, with d null and of any length, sees z + v with v in a subspace.

A head with few null dimensions cannot turn every reading to every prompt, however long d is. Then success cannot go to 100 %, and an
attack is to be held to what is left (METHOD section 9).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from singreg.analysis.steering import outranks, own_prompt, steering_arguments
from singreg.maximiser import FAINT, FAR, ROUNDED
from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator


@dataclass(frozen=True)
class Reach:
    """The directions v (n, r), orthonormal, in which displacements move a translated feature; None of a network, which has none."""

    basis: Tensor | None

    @classmethod
    def of(cls, translator: AnyTranslator, null_space: NullSpace | None) -> Reach:
        """The span of A Π_n, or of A where no null space limits it, for A f + b; its singular directions that are not faint (no shapes)."""
        like = torch.zeros((), dtype=torch.float64) if null_space is None else null_space.basis.double()
        matrix = steering_arguments(translator, like).get("matrix")
        if not isinstance(matrix, Tensor):
            return cls(None)
        allowed = matrix if null_space is None else null_space.component(matrix)
        left, singular, _ = torch.linalg.svd(allowed, full_matrices=False)
        return cls(left[:, singular > FAINT * singular.max().clamp_min(torch.finfo(singular.dtype).tiny)])

    def limit(self, z: Tensor, text: Tensor) -> Tensor:
        """The reading of largest cosine to the text among all z + v. Shapes: z (R, n) float64, text (R, n) unit rows, to (R, n).

        With z = z_v + z_o and t = t_v + t_o it is z_o + t_v |z_o|² / (z_o·t); where z_o·t is not positive it lies at infinity
        along t_v.

        Example:
            >>> z, text = torch.tensor([[-1.0, 4.0]]).double(), torch.tensor([[0.6, 0.8]]).double()
            >>> Reach(torch.eye(2)[:, :1].double()).limit(z, text).round(decimals=4).tolist()
            [[3.0, 4.0]]
        """
        assert self.basis is not None
        inside = (text @ self.basis) @ self.basis.T
        rest = z - (z @ self.basis) @ self.basis.T
        along, size = (rest * text).sum(1), rest.square().sum(1)
        length = torch.linalg.vector_norm(z, dim=1)
        far = FAR * torch.where(length > 0, length, torch.ones_like(length)) / torch.linalg.vector_norm(inside, dim=1).clamp_min(1e-300)
        there = (along > 0) & (size > ROUNDED * z.square().sum(1))
        scale = torch.where(there, size / along.clamp_min(1e-300), far).minimum(far)
        reached: Tensor = rest + scale[:, None] * inside
        return reached

    def first(self, z: Tensor, text: Tensor, texts: Tensor, same: Tensor) -> Tensor:
        """Whether the target outranks all classes in that limit, (R,) bool; of a network nobody knows, so everything is counted.

        Shapes: z (R, n), text (R, n) and all prompts texts (C, n) unit rows, same (R, C) where a prompt is the target's own.
        """
        if self.basis is None:
            return torch.ones(len(z), dtype=torch.bool, device=z.device)
        unit = torch.nn.functional.normalize(self.limit(z.double(), text), dim=-1)
        return outranks((unit * text).sum(-1), unit @ texts.T, same)


def reachable_targets(translator: AnyTranslator, texts: Tensor) -> set[int]:
    """Places of the prompts that some feature makes the translator put first; of a network all of them. texts (C, n) unit rows."""
    reach, exact = Reach.of(translator, None), texts.detach().double().cpu()
    if reach.basis is None:
        return set(range(len(exact)))
    offset = steering_arguments(translator, exact)["offset"]
    first = reach.first(offset.expand(len(exact), -1), exact, exact, own_prompt(exact, exact))
    return set(first.nonzero().flatten().tolist())
