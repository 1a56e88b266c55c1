"""The old name of fit_mlp_on_split; gone when its callers have moved."""

from singreg.analysis.fitting import fit_mlp_on_split as fit_mlp_on_part

__all__ = ["fit_mlp_on_part"]
