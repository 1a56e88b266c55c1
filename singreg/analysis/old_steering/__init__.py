"""Steering in feature space: pairs, curves, natural radii (METHOD sections 4 and 9)."""
