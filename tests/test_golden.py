"""The demo's main figures, frozen: a change that moves them must be argued and the file written anew."""

import json
from pathlib import Path

import pytest

import finetune

ROOT = Path(__file__).parents[1]
FROZEN = json.loads((ROOT / "tests" / "golden" / "demo.json").read_text(encoding="utf-8"))
FIGURES = ("AS_neg", "AS_abs", "IS", "kappa")


@pytest.mark.slow
def test_the_demo_gives_its_frozen_figures(tmp_path: Path) -> None:
    finetune.main(["--config", str(ROOT / "configs" / "demo.yaml"), "--out", str(tmp_path / "demo")])
    found = json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8"))["measurements"]
    assert set(found) == set(FROZEN)
    for stage, wanted in FROZEN.items():
        measured, degrees = found[stage], 1e-3
        assert measured["top1"] == pytest.approx(wanted["top1"], abs=1e-6)
        assert measured["null_share"] == pytest.approx(wanted["null_share"], abs=1e-4)
        assert measured["audit"]["class_variance"] == pytest.approx(wanted["class_variance"], abs=degrees / 20)
        for name in measured["translators"]:
            overall = measured["translators"][name]["overall"]
            assert {key: overall[key] for key in FIGURES} == pytest.approx(wanted[name], abs=degrees), (stage, name)
