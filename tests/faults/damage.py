"""Damage done to files, and what came of using them: the same numbers, a sentence that names the file, or neither."""

from __future__ import annotations

import random
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Outcomes:
    """How often the same numbers came, how often a sentence named the file; everything else with its story."""

    same: int = 0
    named: int = 0
    wrong: list[str] = field(default_factory=list)
    messages: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Damaged files that were used (a number)."""
        return self.same + self.named + len(self.wrong)

    def line(self, what: str) -> str:
        neither = len(self.wrong)
        return f"{what}: {self.count}; {self.same} the very same numbers, {self.named} an error that names the file, {neither} neither"


def damage(path: Path, rng: random.Random) -> str:
    """Change one bit or one byte of a file, or cut its end off; says which. An empty file gets a byte."""
    content = bytearray(path.read_bytes())
    kind = rng.choice(["bit", "byte", "cut"]) if content else "byte"
    if kind == "cut":
        keep = rng.randrange(len(content))
        path.write_bytes(content[:keep])
        return f"cut to {keep} of {len(content)} bytes"
    if not content:
        path.write_bytes(b"x")
        return "one byte in an empty file"
    place = rng.randrange(len(content))
    old = content[place]
    content[place] = old ^ (1 << rng.randrange(8)) if kind == "bit" else (old + rng.randrange(1, 256)) % 256
    path.write_bytes(content)
    return f"byte {place} of {len(content)} from {old:#04x} to {content[place]:#04x}"


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder but TensorBoard's logs, which nothing ever reads back, relative to it, sorted."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name)


def names(text: str, folder: Path, file: Path) -> bool:
    """Whether a message names a file of a folder, or the folder in it that the file lies in (paths).

    A file at the top has no folder of its own: its path is ".", which every sentence with a full stop would "name".
    """
    return file.name in text or (file.parent != Path() and str(folder / file.parent) in text)


def judge(
    folder: Path, file: Path, how: str, use: Callable[[], Any], wanted: Any, outcomes: Outcomes,
    errors: tuple[type[BaseException], ...],
) -> None:  # fmt: skip
    """Use what was damaged: right are the wanted result, or one of `errors` that names the file (relative to the folder; see `names`)."""
    story = f"{file} ({how})"
    try:
        found = use()
    except errors as error:
        text = str(error)
        if names(text, folder, file):
            outcomes.named += 1
            outcomes.messages.setdefault(file.name, text)
        else:
            outcomes.wrong.append(f"{story}: an error that does not name it: {text[:300]}")
    except BaseException:
        outcomes.wrong.append(f"{story}: a bare traceback: {traceback.format_exc()[-900:]}")
    else:
        if found == wanted:
            outcomes.same += 1
        else:
            outcomes.wrong.append(f"{story}: ANOTHER RESULT")


def fresh_copy(source: Path, target: Path) -> Path:
    """A copy of a folder in the place of whatever was at the target."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target
