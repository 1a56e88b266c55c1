"""T(f) and T(f~) of many features at once, the removal folded into the translator where it is linear (paper eq. 4 and 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator, Translator


class EquivalentPairs:
    """Features to their translations before and after the removal: (B, m) to z and z~, both (B, n).

    For a linear translator A Q Qᵀ is formed once, in float64, so that z~ = f (A Π_p)ᵀ + (a + A Π_n μ) costs one product and has
    no difference of large numbers in it; A and A Π_p are stacked, so z and z~ come out of the same product. Any other translator
    is called on f and on `null_space.remove(f)`.

    Args:
        mean: (m,) feature mean μ for the centred removal f - Π_n (f - μ); None is the paper's f - Π_n f (METHOD section 8.4).

    Raises:
        ValueError: the translator's, the head's and the mean's widths differ.

    Example:
        >>> space = NullSpace.from_weight(torch.tensor([[1.0, 0.0]]))
        >>> pairs = EquivalentPairs(LinearTranslator(torch.eye(2), torch.ones(2)), space)
        >>> [z.tolist() for z in pairs(torch.tensor([[2.0, 3.0]]))]
        [[[3.0, 4.0]], [[3.0, 1.0]]]
    """

    def __init__(self, translator: Translator, null_space: NullSpace, *, mean: Tensor | None = None) -> None:
        width = null_space.basis.shape[0]
        if translator.feature_dim != width or (mean is not None and mean.shape != (width,)):
            raise ValueError(
                f"the translator takes {translator.feature_dim} features and the head {width}"
                f"{'' if mean is None else f', and the mean is {tuple(mean.shape)}'}: all three must be of one width"
            )
        self.translator, self.null_space, self.mean = translator, null_space, mean
        self._stacked: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        if isinstance(translator, LinearTranslator):
            matrix, offset = translator.matrix.double(), translator.offset.double()
            visible = (matrix @ null_space.basis.to(matrix)) @ null_space.basis.to(matrix).T
            kept = offset if mean is None else offset + (matrix - visible) @ mean.to(matrix)
            product, bias = torch.cat([matrix, visible]), torch.cat([offset, kept])
            self._stacked = {torch.float64: (product, bias), torch.float32: (product.float(), bias.float())}

    @property
    def centred(self) -> bool:
        """True for the centred removal (no shapes)."""
        return self.mean is not None

    @torch.no_grad()
    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """z = T(f) and z~ = T(f~). Shapes: (B, m), float32 or float64, to two (B, n) of the same dtype."""
        if features.shape[-1] != self.translator.feature_dim:
            raise ValueError(f"expected features (B, {self.translator.feature_dim}), got {tuple(features.shape)}")
        if not self._stacked:
            return self.translator(features), self.translator(self.null_space.remove(features, mean=self.mean))
        matrix, offset = self._stacked[features.dtype]
        z, equivalent = torch.split(torch.addmm(offset, features, matrix.T), self.translator.target_dim, dim=1)
        return z, equivalent
