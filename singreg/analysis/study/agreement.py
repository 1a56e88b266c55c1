"""The old home of translator_agreement."""

from singreg.analysis.fitting import translator_agreement

__all__ = ["translator_agreement"]
