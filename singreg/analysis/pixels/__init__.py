"""Steering in pixels: attack, judges, checks (METHOD section 9)."""
