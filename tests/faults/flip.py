"""Flip bits in, or cut, every file of run folders, use them, and count: the same numbers, a named file, or (never) neither.

python -m tests.faults.flip --count 200
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from singreg.models.classifier import Classifier
from singreg.reporting.report_files import read_report
from singreg.translator import load_translator
from tests.faults.damage import Outcomes, damage, files_of, fresh_copy, judge
from tests.faults.in_process import Refused, recipe, report_of, study_report_of
from tests.faults.processes import one_core, run, tiny

STUDY: dict[str, Any] = {
    "name": "study",
    "data": {"scenes_train": 32, "scenes_audit": 40, "scenes_test": 20, "scenes_bank": 0, "augmentation": "none", "image_size": 32},
    "model": {"name": "test_resnet", "pretrained": False, "head": "new"},
    "training": {"epochs": 1, "batch_size": 16},
    "translator": {"refreshes": 0, "ridge": 1.0},
    "auditor": {"ridge": 1.0},
    "halves": False,
    "corruptions": [],
    "agreement_sizes": [6, 12],
    "seeds": [0],
    "arms": [
        {"name": "plain", "train": "head", "role": "baseline", "overrides": {"loss.weight": 0}},
        {"name": "mixed", "from": "plain", "train": "none", "interpolate": 0.5},
        {"name": "sing", "train": "head"},
    ],
}


KINDS = {"finished": "run", "killed": "run", "studies": "study", "unfinished": "study"}


class Folders:
    """Whole folders to be damaged: a finished run, one killed in its second arm, a finished study, one whose last arm is missing."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.cache = scratch, scratch / "cache"
        whole = run(tiny(scratch / "finished", self.cache), scratch / "finished.log")
        arm = scratch / "killed" / "run" / "checkpoints" / "sing"
        run(
            tiny(scratch / "killed", self.cache, "--runs", str(scratch / "killed")), scratch / "killed.log", signal=signal.SIGKILL,
            when=lambda: len(list(arm.glob("step-*/position.json"))) > 1,
        )  # fmt: skip
        if whole.status or not list(arm.glob("step-*")):
            raise RuntimeError(f"no folders to damage: {whole.said}")
        file = scratch / "study.yaml"
        file.write_text(yaml.safe_dump(STUDY))
        recipe("study", "--config", str(file), "--runs", str(scratch / "studies"), "--cache", str(self.cache))
        fresh_copy(scratch / "studies", scratch / "unfinished")
        shutil.rmtree(scratch / "unfinished" / "study" / "arms" / "mixed")
        for kind in KINDS:  # the folders are damaged where they are: a run's configuration knows its place
            fresh_copy(scratch / kind, scratch / "whole" / kind)
        self.wanted: dict[Path, Any] = {}
        self.report = report_of(scratch / "finished" / "run")
        self.study = study_report_of(scratch / "studies" / "study")
        self.whole_report = read_report(scratch / "finished" / "run")

    def sources(self) -> list[tuple[str, Path]]:
        """Every (kind of folder, file in it)."""
        return [(kind, file) for kind, name in KINDS.items() for file in files_of(self.scratch / "whole" / kind / name)]

    def use(self, kind: str, folder: Path, file: Path) -> tuple[Callable[[], Any], Any]:
        """What is done with a damaged file, and what a whole one gives."""
        source = self.scratch / "whole" / kind / folder.name
        if file.suffix == ".safetensors" and file.name.startswith("translator"):
            return lambda: _translator(folder / file), _translator(source / file)
        if file.parent.name.startswith("model"):
            model = source / file.parent
            if model not in self.wanted:
                self.wanted[model] = self._model(model)
            return lambda: self._model(folder / file.parent), self.wanted[model]
        if str(file) == "report.json" and kind == "finished":
            return lambda: read_report(folder) == self.whole_report, True
        if folder.name == "study":
            return lambda: self._study(folder), self.study
        return lambda: self._resumed(folder), self.report

    def _resumed(self, folder: Path) -> dict[str, Any]:
        # The way a user goes on: with the command that the run itself had printed; on one core, as the run it is compared with.
        with one_core():
            recipe("finetune", "--config", str(folder / "config.yaml"), "--resume", "true")
        wanted = self.scratch / "whole" / "finished" / "run"
        for name in ("model", "model-control"):
            mine, theirs = (load_file(path / name / "model.safetensors") for path in (folder, wanted))
            if not all(torch.equal(mine[key], theirs[key]) for key in theirs):
                return {"another": name}
        return report_of(folder)

    def _study(self, folder: Path) -> dict[str, Any]:
        recipe("study", "--config", str(folder / "config.yaml"), "--runs", str(folder.parent), "--resume", "true")
        return study_report_of(folder)

    def _model(self, folder: Path) -> list[Any]:
        """As recipes read it, by the folder's name, and as anybody's own code does."""
        given = ["--data.scenes_audit", "20", "--data.scenes_test", "20", "--data.scenes_train", "20", "--data.scenes_bank", "0"]
        said = recipe(
            "analyze", "--model.name", f"local-dir:{folder}", "--dry_run", "true", "--runs", str(self.scratch / "none"),
            "--cache", str(self.cache), *given,
        )  # fmt: skip
        classifier = Classifier.from_timm(f"local-dir:{folder}")
        state = {name: value.tolist() for name, value in classifier.model.state_dict().items()}
        return [said.replace(str(folder), ""), state, classifier.preprocessing, classifier.class_names]


def _translator(file: Path) -> list[Any]:
    translator = load_translator(file)
    return [{name: value.tolist() for name, value in translator.state_dict().items()}, translator.info]


def flip(count: int, scratch: Path, *, seed: int = 0, folders: Folders | None = None) -> Outcomes:
    """Damage `count` files, one folder each, every file in turn in an order of chance, and use what was damaged."""
    folders, rng, outcomes = folders or Folders(scratch), random.Random(seed), Outcomes()
    sources = folders.sources()
    rng.shuffle(sources)
    logging.disable(logging.WARNING)
    try:
        for place in range(count):
            kind, file = sources[place % len(sources)]
            folder = fresh_copy(folders.scratch / "whole" / kind / KINDS[kind], folders.scratch / kind / KINDS[kind])
            use, wanted = folders.use(kind, folder, file)
            how = f"{kind}: {damage(folder / file, rng)}"
            judge(folder, file, how, use, wanted, outcomes, (Refused, ValueError, FileNotFoundError))
    finally:
        logging.disable(logging.NOTSET)
    return outcomes


def main() -> None:
    """Print the counts and a message by file; exit status 1 when something was neither right nor named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="singreg-flip-"))
    outcomes = flip(given.count, scratch, seed=given.seed)
    for name, text in sorted(outcomes.messages.items()):
        print(f"{name}: {' '.join(text.replace(str(scratch), '').split())[:200]}")
    print("\n".join([*outcomes.wrong, outcomes.line("damaged folders")]))
    shutil.rmtree(scratch)
    sys.exit(1 if outcomes.wrong else 0)


if __name__ == "__main__":
    main()
