"""A study's arms against the reference: pairing, seeds, targets, the verdict and figures, on rows made up for it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from singreg.analysis.arms import AUDITOR, Measured
from singreg.analysis.study import (
    Summary,
    by_name,
    compare_with_reference,
    pareto_front,
    study_verdict,
    study_warnings,
    summarize_study,
)
from singreg.config import FinetuneConfig
from singreg.plots.study import save_pareto
from singreg.study import ArmConfig, Work
from singreg.utils import plain

N = 200
FACTS = {"images": N, "auditor_images": 700, "features": 100}
Run = tuple[Work, Measured]


def rows(seed: int, *, harm: float = 4.0, right: float = 0.9, step: float = 0.2, unreachable: int = 0) -> pd.DataFrame:
    base = np.random.default_rng(seed).gamma(4, 0.25, N)
    return pd.DataFrame(
        {
            "image": [f"image {i}" for i in range(N)],
            "label": np.arange(N) % 7,
            f"AS/{AUDITOR}": -harm * base,
            f"IS/{AUDITOR}": 40 * base,
            "correct": (np.arange(N) < right * N).astype(float),
            f"steering_step/{AUDITOR}": np.where(np.arange(N) < unreachable, np.nan, step * base),
            f"AS25/{AUDITOR}": 10 * harm * base,
            f"success25/{AUDITOR}": np.full(N, harm / 10),
            f"manifold_success95/{AUDITOR}": np.full(N, harm / 10),
            "harmless_residual": 0.5 * base,
            "harmless_spread": base,
        }
    )


def work(name: str, seed: int = 0, *, trained: bool = True, **about: Any) -> Work:
    return Work(ArmConfig(name, **about), seed, FinetuneConfig(), None, trained, "", Path())


def run(arm: str, seed: int = 0, *, probe: float = 0.8, about: Any = None, held: Any = None, **options: Any) -> Run:
    """Only what the aggregation reads of an arm's figures."""
    found = rows(seed, **options)
    top1, harm, image = (float(found[key].mean()) for key in ("correct", f"AS/{AUDITOR}", f"IS/{AUDITOR}"))
    figures = {"top1": top1, "null_probe": probe, "harmless_r2": 0.5, "audit_gap": 1.1}
    figures |= {f"AS_neg/{AUDITOR}": -harm, f"AS_abs/{AUDITOR}": -harm, f"IS/{AUDITOR}": image}
    intervals = {"top1": [top1 - 0.02, top1 + 0.02], "null_probe": [probe - 0.02, probe + 0.02]}
    intervals |= {f"AS_neg/{AUDITOR}": [-0.9 * harm, -1.1 * harm]}
    return work(arm, seed, **(about or {})), Measured(figures, intervals, found, held or {})


def plain_arms(held: Any = None) -> list[Run]:
    return [run("plain", seed, about={"role": "baseline"}, held=held) for seed in (0, 1)]


def study(*more: Run) -> list[Summary]:
    return summarize_study([*plain_arms(), *more], "plain")


def verdict(arms: list[Summary], claim: str | None = None) -> list[str]:
    return study_verdict(arms, "plain", claim, **FACTS)


def test_pairs_are_ratios_of_means_averaged_over_seeds() -> None:
    arm, plain_rows = ({seed: rows(seed, harm=harm) for seed in (0, 1)} for harm in (1.0, 4.0))
    arm[1].loc[:49, f"AS/{AUDITOR}"] = 3.0  # benign there: no harm
    found = compare_with_reference(arm, plain_rows)["AS_neg"]
    each = [[np.maximum(-of[s][f"AS/{AUDITOR}"], 0).mean() for s in (0, 1)] for of in (arm, plain_rows)]
    assert found["value"] == pytest.approx(np.mean(each[0]) / np.mean(each[1]), rel=1e-12)
    assert found["low"] < found["value"] < found["high"]


def test_a_step_out_of_reach_in_either_arm_is_in_neither() -> None:
    arm, plain_rows = {0: rows(0, step=0.6, unreachable=80)}, {0: rows(0, step=0.2)}
    assert compare_with_reference(arm, plain_rows)["step"]["value"] == pytest.approx(3.0)
    one, other = (each[0][f"steering_step/{AUDITOR}"].mean() for each in (arm, plain_rows))
    assert one / other != pytest.approx(3.0, abs=0.01)  # the control: with those images in one mean only


def test_only_common_seeds_and_the_same_images_are_paired() -> None:
    arm = {1: rows(1, harm=2.0)}
    found = compare_with_reference(arm, {0: rows(0), 1: rows(1)})["AS_neg"]
    assert found["value"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="other images"):
        compare_with_reference({0: rows(0).assign(image=rows(0)["image"].to_numpy()[::-1])}, {0: rows(0)})


def test_means_and_spreads_over_seeds() -> None:
    found = by_name(study(*[run("a", seed, right=right) for seed, right in ((0, 0.8), (1, 0.9))], run("b")), "a")
    assert (found["mean"]["top1"], found["spread"]["top1"]) == pytest.approx((0.85, np.std([0.8, 0.9], ddof=1)))
    assert math.isnan(by_name(study(run("b")), "b")["spread"]["top1"])


def test_the_pareto_front_keeps_what_nothing_beats() -> None:
    points = {
        "good": (0.9, 1.0),
        "same": (0.9, 1.0),
        "accurate": (0.95, 3.0),
        "beaten": (0.9, 1.1),
        "worst": (0.1, 9.0),
    }
    assert pareto_front(points) == {"good", "same", "accurate"}


def test_targets_are_reached_or_not_by_their_value() -> None:
    arms = study(*[run("strong", s, harm=0.6, step=0.7, probe=0.3) for s in (0, 1)], run("weak", harm=3.9, right=0.8))
    strong, weak = ({each["name"]: each for each in by_name(arms, name)["targets"]} for name in ("strong", "weak"))
    assert all(each["reached"] for each in strong.values())
    assert {name for name, each in weak.items() if each["reached"]} == {"IS", "harmless-attribute R²", "audit gap"}
    assert strong["auditor AS⁻"]["found"].startswith("0.15×")
    assert weak["top-1"]["found"].startswith("-10.00 points")
    assert by_name(arms, "plain")["targets"] == []


def test_an_untrained_arm_is_compared_with_every_seed() -> None:
    arms = study(run("edit", harm=1.0, about={"train": "none", "trained": False}))
    found, fixed = by_name(arms, "edit")["paired"]["AS_neg"], rows(0, harm=1.0)[f"AS/{AUDITOR}"].mean()
    assert found["value"] == pytest.approx(fixed / np.mean([rows(s)[f"AS/{AUDITOR}"].mean() for s in (0, 1)]))


def test_the_verdict_names_claim_placebos_and_what_is_missed() -> None:
    arms = [*[run("sing", s, harm=1.0) for s in (0, 1)], run("other", harm=0.2)]
    without = study(*arms)
    assert "says nothing about one" in verdict(without)[0]  # neither claimed nor chosen on validation images
    assert "no placebo arm" in verdict(without, claim="sing")[1]
    for harm, words in ((4.0, "clearly more than sing (0.25×"), (0.9, "not clearly more than sing")):
        said = verdict(study(*arms, run("shuffled", harm=harm, about={"role": "placebo"})), claim="sing")
        assert said[0].startswith("sing (the arm named beforehand) leaves an auditor's AS⁻ of 0.97°, 0.25×")
        assert f"], {words}" in said[1]
        assert "not reached: auditor AS⁻ 0.25×" in said[2]
    beside = study(*arms, run("shuffled", harm=4.0, about={"role": "placebo", "control_of": "other"}))
    assert "clearly more than other" in verdict(beside, claim="sing")[1]
    assert [warning for warning in study_warnings(without) if "one seed only" in warning and "other" in warning]


def test_the_validation_images_choose_and_the_test_images_judge() -> None:
    def held(top1: float, harm: float) -> dict[str, Any]:
        return {"top1": top1, "AS_neg": harm, "AS_abs": harm, "IS": 40.0, "step": 0.3, "images": 100.0}

    arms = [
        run("lucky", harm=0.2, held=held(0.9, 3.9)),
        run("steady", harm=1.0, held=held(0.897, 0.7)),
        run("inaccurate", harm=0.1, held=held(0.8, 0.1)),
    ]
    found = summarize_study([*plain_arms(held(0.9, 4.0)), *arms], "plain")
    assert verdict(found)[0].startswith("steady (chosen on the validation images) leaves")
    assert "200 test images, auditor of 700 others, 1 seed(s)" in verdict(found)[0]
    claimed = verdict(found, claim="lucky")
    assert [sentence.split(" leaves")[0] for sentence in claimed[:2]] == [
        "lucky (the arm named beforehand)",
        "steady (chosen on the validation images)",
    ]
    assert len(claimed) == 4


def test_too_few_auditor_images_support_no_claim() -> None:
    arms, few = study(run("sing", harm=1.0)), {**FACTS, "auditor_images": 599}
    (said,) = study_verdict(arms, "plain", "sing", **few)
    assert said.startswith("No claim: the auditor has 599 images, 600 are needed")


def test_an_arm_without_a_null_space_is_a_row_that_says_so(tmp_path: Path) -> None:
    dropped = work("dropped", role="baseline", train="none", drop_null=True, trained=False)
    arms = study(run("sing", harm=1.0), (dropped, Measured({"top1": 0.9})))
    last = json.loads(json.dumps(plain(arms), allow_nan=False))[-1]
    assert (last["mean"], last["paired"], last["targets"]) == ({"top1": 0.9}, {}, [])
    assert "no null space" in last["omitted"]
    figure = save_pareto(arms, "plain", tmp_path / "pareto.png")
    assert min(Image.open(figure.path).size) > 200
