"""Robustness to steering in feature space, and the sanity rules of every attack (METHOD section 9)."""
