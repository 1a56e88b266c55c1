"""Sanity rules of a steering evaluation as named checks that run every time (METHOD section 9)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One sanity rule: its name, whether it held, and what was found (numbers in words)."""

    name: str
    passed: bool
    found: str
