"""How far two translators agree on where the classes lie: the test of whether there were pictures enough (METHOD section 8.6)."""

from __future__ import annotations

import torch
from torch import Tensor

from singreg.translator import LinearTranslator


def translator_agreement(first: LinearTranslator, second: LinearTranslator, texts: Tensor) -> float:
    """Mean cosine, over classes, of the class directions Aᵀ(t_k - t̄) of two linear translators; 1 is full agreement.

    What all prompts share is left out: it says nothing about a class. Shapes: texts (C, n); both A (n, m).

    Raises:
        ValueError: fewer than two classes, or translators of other widths.

    Example:
        >>> T = LinearTranslator(torch.randn(4, 6), torch.zeros(4))
        >>> round(translator_agreement(T, T, torch.eye(4)[:3]), 6)
        1.0
    """
    if len(texts) < 2:
        raise ValueError(f"class directions need at least 2 classes, got texts {tuple(texts.shape)}")
    if first.matrix.shape != second.matrix.shape or texts.shape[1] != first.matrix.shape[0]:
        raise ValueError(
            f"expected two translators (n, m) and texts (C, n), got {tuple(first.matrix.shape)}, {tuple(second.matrix.shape)} "
            f"and {tuple(texts.shape)}"
        )
    contrasts = (texts - texts.mean(0)).double()
    one, other = (contrasts @ translator.matrix.to(contrasts) for translator in (first, second))
    return float(torch.nn.functional.cosine_similarity(one, other, dim=1).mean())
