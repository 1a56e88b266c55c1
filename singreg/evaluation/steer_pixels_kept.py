"""What a resumed pixel job may take over: only what was made with the very weights and translators that it has now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from singreg.models.vision_language import hash_of_state

MADE_FROM = "made_from"


def made_from(classifier: nn.Module, translators: Mapping[str, nn.Module]) -> dict[str, str]:
    """SHA-256 of the classifier's and every translator's weights by name (any shapes)."""
    return {"classifier": hash_of_state(classifier), **{name: hash_of_state(found) for name, found in translators.items()}}


def read_kept(path: Path, made: Mapping[str, str]) -> dict[str, Any] | None:
    """The JSON file at the path where a killed run left it, None where there is none.

    Raises:
        SystemExit: it was made with other weights than `made`, or does not say with which: pictures crafted on one model must not
            be judged as another's.
    """
    if not path.is_file():
        return None
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    known = value.get(MADE_FROM, {})
    other = [name for name in made if known.get(name) != made[name]]
    if other:
        raise SystemExit(
            f"error: {path} was made with other weights than there are now (other or unknown: {', '.join(other)}), so it cannot be gone on "
            f"with; start anew with another --name, or delete the folder {path.parent}"
        )
    return value
