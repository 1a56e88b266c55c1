"""What a resumed pixel job may take over: only what was made with the very weights and pictures that it has now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from singreg.data.datasets import Splits
from singreg.models.vlm import hash_of_state

MADE_FROM = "made_from"


def made_from(classifier: nn.Module, pictures: Splits, vlm_weights_hash: str) -> dict[str, str]:
    """Hashes of all that attacked pictures hang on beside the configuration, by what they are called in messages (any shapes).

    Translators follow from these; their own last bits may differ from one machine to the next.
    """
    parts = {f"{part} pictures": getattr(pictures, part).fingerprint for part in ("bank", "audit", "test")}
    return {"classifier": hash_of_state(classifier), **parts, "vision-language model": vlm_weights_hash}


def read_kept(path: Path, made: Mapping[str, str]) -> dict[str, Any] | None:
    """The JSON file at the path where a killed run left it, None where there is none.

    Raises:
        SystemExit: it was made from something else than `made`, or does not say from what: pictures crafted on one model must not
            be judged as another's.
    """
    if not path.is_file():
        return None
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    known = value.get(MADE_FROM, {})
    other = [name for name in made if known.get(name) != made[name]]
    if other:
        raise SystemExit(
            f"error: {path} was made from something else than there is now (other or unknown: {', '.join(other)}), so it cannot be gone on "
            f"with; start anew with another --name, or delete the folder {path.parent}"
        )
    return value
