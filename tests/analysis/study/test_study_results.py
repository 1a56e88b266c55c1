"""A study's arms against the reference: pairing, seeds, targets and sentences, on rows made up for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from singreg.analysis.study.auditors import AgreementPoint
from singreg.analysis.study.results import (
    AUDITOR,
    ArmRun,
    StudyReport,
    compare_with_reference,
    pareto_front,
    summarize,
)
from singreg.analysis.study.targets import attribute_groups, best_arm, study_report, targets
from singreg.reporting.readme_study import study_summary
from singreg.reporting.study_curves import draw_auditor_need, draw_tradeoff
from singreg.reporting.study_plots import draw_pareto, draw_study
from singreg.reporting.study_report import study_markdown
from singreg.reporting.study_tables import study_table, validation_table

N = 200
NAMES = np.array([f"picture {i}" for i in range(N)])


def rows(seed: int, *, harm: float = 4.0, right: float = 0.9, step: float = 0.2, unreachable: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    base = rng.gamma(4, 0.25, N)
    steps = np.where(np.arange(N) < unreachable, np.nan, step * base)
    return {
        "image": NAMES,
        f"AS/{AUDITOR}": -harm * base,
        f"IS/{AUDITOR}": 40 * base,
        "correct": (np.arange(N) < right * N).astype(float),
        f"steering_step/{AUDITOR}": steps,
        f"AS25/{AUDITOR}": 10 * harm * base,
        f"success25/{AUDITOR}": np.full(N, harm / 10),
        "harmless_residual": 0.5 * base,
        "harmless_spread": base,
    }


def run(
    arm: str, seed: int, role: str = "method", train: str = "all", trained: bool = True, probe: float = 0.8, fit_images: int = 700,
    validation: dict[str, float] | None = None, **options: Any,
) -> ArmRun:  # fmt: skip
    """Only what the aggregation reads of an arm's figures."""
    found = rows(seed, **options)
    top1, harm, image = (float(found[key].mean()) for key in ("correct", f"AS/{AUDITOR}", f"IS/{AUDITOR}"))
    flat = {
        "top1": top1, "null_probe": probe, "null_share": 0.9, "harmless_r2": 0.5, f"AS_neg/{AUDITOR}": -harm,
        f"AS_abs/{AUDITOR}": -harm, f"IS/{AUDITOR}": image, "AS_neg/loop": -harm / 1.1, "AS_abs/loop": -harm, "ece": 0.1, "nll": 1.0,
    }  # fmt: skip
    intervals = {key: [1.0, 2.0] for key in ("AS_neg", "AS_abs", "IS", "ratio", "kappa")}
    figures = SimpleNamespace(
        rows=found,
        flat=lambda: flat,
        harmless_r2=[0.5, 0.4, 0.6],
        information=SimpleNamespace(intervals={"accuracy null_space": [probe - 0.02, probe + 0.02]}),
        measurement=SimpleNamespace(
            images=N, top1_interval=[top1 - 0.02, top1 + 0.02], head=SimpleNamespace(features=100),
            translators={AUDITOR: SimpleNamespace(intervals=intervals, fit_images=fit_images)},
        ),
    )  # fmt: skip
    return ArmRun(arm, role, train, "", seed, figures, seconds=1.0, trained=trained, validation=validation or {})  # type: ignore[arg-type]


def study(*more: ArmRun, claim: str | None = None) -> Any:
    plain = [run("plain", seed, "baseline") for seed in (0, 1)]
    return study_report([*plain, *more], reference="plain", claim=claim)


def test_pairs_are_ratios_of_means_over_pictures_averaged_over_seeds() -> None:
    arm, plain = ({seed: rows(seed, harm=harm) for seed in (0, 1)} for harm in (1.0, 4.0))
    arm[1][f"AS/{AUDITOR}"][:50] = 3.0  # benign there: no harm
    found = compare_with_reference(arm, plain)["AS_neg"]
    mine, theirs = (np.mean([np.maximum(-each[s][f"AS/{AUDITOR}"], 0).mean() for s in (0, 1)]) for each in (arm, plain))
    assert found.value == pytest.approx(mine / theirs, rel=1e-12)
    assert found.low < found.value < found.high
    assert found.by_seed == pytest.approx(
        [np.maximum(-arm[s][f"AS/{AUDITOR}"], 0).mean() / -plain[s][f"AS/{AUDITOR}"].mean() for s in (0, 1)]
    )
    assert found.by_seed[0] != pytest.approx(found.by_seed[1])


def test_a_step_out_of_reach_in_either_arm_is_in_neither() -> None:
    """The control: with those pictures in one mean only, the ratio would be another."""
    arm, plain = {0: rows(0, step=0.6, unreachable=80)}, {0: rows(0, step=0.2)}
    assert compare_with_reference(arm, plain)["step"].value == pytest.approx(3.0)
    one, other = (each[0][f"steering_step/{AUDITOR}"] for each in (arm, plain))
    assert np.nanmean(one) / np.nanmean(other) != pytest.approx(3.0, abs=0.01)


def test_only_common_seeds_and_the_same_pictures_are_paired() -> None:
    arm = {1: rows(1, harm=2.0)}
    found = compare_with_reference(arm, {0: rows(0), 1: rows(1)})["AS_neg"]
    assert found.value == pytest.approx(0.5)
    assert len(found.by_seed) == 1
    with pytest.raises(ValueError, match=r"no seed in common: \[1\] and \[0\]"):
        compare_with_reference(arm, {0: rows(0)})
    with pytest.raises(ValueError, match="other pictures"):
        compare_with_reference({0: {**rows(0), "image": NAMES[::-1]}}, {0: rows(0)})


def test_means_and_spreads_over_seeds() -> None:
    mean, spread = summarize([run("a", seed, right=right) for seed, right in ((0, 0.8), (1, 0.9))])
    assert (mean["top1"], spread["top1"]) == pytest.approx((0.85, np.std([0.8, 0.9], ddof=1)))
    assert mean["audit_gap"] == pytest.approx(1.1)
    assert math.isnan(summarize([run("a", 0)])[1]["top1"])


def test_the_pareto_front_keeps_what_nothing_beats() -> None:
    points = {"good": (0.9, 1.0), "same": (0.9, 1.0), "accurate": (0.95, 3.0), "beaten": (0.9, 1.1), "worst": (0.1, 9.0)}
    assert pareto_front(points) == {"good", "same", "accurate"}


def test_targets_are_reached_or_not_by_their_value() -> None:
    report = study(*[run("strong", seed, harm=0.6, step=0.7, probe=0.3) for seed in (0, 1)], run("weak", 0, harm=3.9, right=0.8))
    strong, weak = ({t.name: t for t in report.by_name(name).targets} for name in ("strong", "weak"))
    assert all(target.reached for target in strong.values()), [t for t in strong.values() if not t.reached]
    assert {name for name, target in weak.items() if target.reached} == {"IS", "harmless-attribute R²", "audit gap"}
    assert strong["auditor AS⁻"].found.startswith("0.15×")
    assert weak["top-1"].found.startswith("-10.00 points")
    assert report.by_name("plain").targets == []
    assert not targets(report.by_name("plain"), report.by_name("plain"))


def test_an_untrained_arm_is_compared_with_every_seed_of_the_reference() -> None:
    report = study(run("edit", 0, harm=1.0, train="none", trained=False))
    found = report.by_name("edit").paired["AS_neg"]
    fixed, each = rows(0, harm=1.0), [rows(seed) for seed in (0, 1)]
    assert found.value == pytest.approx(fixed[f"AS/{AUDITOR}"].mean() / np.mean([e[f"AS/{AUDITOR}"].mean() for e in each]))
    assert len(found.by_seed) == 2


def test_the_sentences_name_the_claim_the_placebo_and_what_is_missed() -> None:
    arms = [*[run("sing", s, harm=1.0) for s in (0, 1)], run("other", 0, harm=0.2)]
    without = study(*arms)
    assert best_arm(without).arm == "other"  # type: ignore[union-attr]
    assert "other (chosen afterwards" in without.sentences[0]
    assert "no placebo arm" in without.sentences[1]
    harmless, same = (study(*arms, run("shuffled", 0, "placebo", harm=harm), claim="sing") for harm in (4.0, 0.9))
    assert harmless.sentences[0].startswith("sing (the arm named beforehand) leaves an auditor's AS⁻ of 0.97°, 0.25×")
    assert "sing 0.25× [0.25, 0.25]: clearly more, so the effect rests on what the placebo takes away" in harmless.sentences[1]
    assert "not clearly more, so it is not shown that the effect rests" in same.sentences[1]
    assert "not reached: auditor AS⁻ 0.25×" in harmless.sentences[2]
    assert any("one seed only" in warning and "other" in warning for warning in harmless.warnings)
    assert not any("pictures for" in warning for warning in harmless.warnings)


def held(top1: float, harm: float) -> dict[str, float]:
    return {"top1": top1, "AS_neg": harm, "AS_abs": harm, "IS": 40.0, "step": 0.3, "images": 100.0}


def test_the_validation_part_chooses_and_the_test_part_judges() -> None:
    """The arm that is best on the test pictures is not taken when the validation pictures speak for another."""
    plain = [run("plain", seed, "baseline", validation=held(0.9, 4.0)) for seed in (0, 1)]
    arms = [
        run("lucky", 0, harm=0.2, validation=held(0.9, 3.9)), run("steady", 0, harm=1.0, validation=held(0.897, 0.7)),
        run("inaccurate", 0, harm=0.1, validation=held(0.8, 0.1)),
    ]  # fmt: skip
    report = study_report([*plain, *arms], reference="plain")
    assert best_arm(report).arm == "steady"  # type: ignore[union-attr]
    assert report.sentences[0].startswith("steady (chosen on the validation part) leaves")
    assert "200 test pictures, auditor of 700 others, 1 seed(s)" in report.sentences[0]
    claimed = study_report([*plain, *arms], reference="plain", claim="lucky")
    assert [sentence.split(" leaves")[0] for sentence in claimed.sentences[:2]] == [
        "lucky (the arm named beforehand)", "steady (chosen on the validation part)",
    ]  # fmt: skip
    assert "| steady" in validation_table(report)
    without = study_report([run("plain", 0, "baseline"), *[replace(arm, validation={}) for arm in arms]], reference="plain")
    assert best_arm(without).arm == "inaccurate"  # type: ignore[union-attr]


def test_too_few_auditor_pictures_support_no_claim() -> None:
    few = [run("plain", 0, "baseline", fit_images=599), run("sing", 0, harm=1.0, fit_images=599)]
    assert study_report(few, reference="plain").sentences == [
        "No claim: the auditor was fitted on 599 pictures and needs 600; the figures below compare arms only roughly."
    ]
    assert not any("No claim" in sentence for sentence in study(run("sing", 0, harm=1.0)).sentences)


def test_the_curves_draw_every_arm_and_mark_the_auditor() -> None:
    points = [AgreementPoint(n, 0.5, [0.6, 0.61], [5.0, 5.2]) for n in (100, 200, 400)]
    found = study_report([run("plain", 0, "baseline"), run("sing", 0, harm=1.0)], reference="plain", agreement=points)
    lines = draw_auditor_need(found).axes[2].lines
    assert [list(line.get_ydata()) for line in lines] == [[5.0] * 3, [5.2] * 3, [0, 1], [0, 1]]
    assert [line.get_xdata()[0] for line in lines[2:]] == [700, 600]
    for arm in found.arms:
        arm.mean.update({f"steering_step/{AUDITOR}": 0.3, f"AS_abs25/{AUDITOR}": 20.0})
    shown = {text.get_text() for text in draw_tradeoff(found).axes[0].texts}
    assert shown == {"plain", "sing"}


def test_without_the_reference_nothing_is_said() -> None:
    with pytest.raises(ValueError, match="no finished run of the reference arm 'plain'"):
        study_report([run("sing", 0)], reference="plain")


def test_an_arm_without_a_null_space_is_a_row_that_says_so(tmp_path: Any) -> None:
    dropped = ArmRun("dropped", "baseline", "none", "", 0, None, {"top1": 0.9, "logit_change": 1e-6}, trained=False)
    report = study(run("sing", 0, harm=1.0), dropped)
    assert "no null space" in (report.by_name("dropped").omitted or "")
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["arms"][-1]["mean"] == {"top1": 0.9}
    line = next(line for line in study_table(report, compact=True).splitlines() if line.startswith("dropped"))
    assert line.split()[1:4] == ["1", "90.0%", "–"]
    text = study_markdown(report, {name: tmp_path / f"{name}.png" for name in ("study", "pareto", "tradeoff")})
    assert "logit change 1e-06" in text
    assert len(draw_study(report).axes) == 7
    shown = [text.get_text().strip() for text in draw_pareto(report).axes[0].texts]
    assert sorted(shown) == ["plain", "sing"]


def test_names_in_the_pareto_plot_never_overlap() -> None:
    """Twenty arms in almost the same place."""
    report = study(*[run(f"arm {i}", 0, harm=4 + 0.001 * i) for i in range(20)])
    figure = draw_pareto(report)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 21
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_attributes_are_grouped_by_what_they_are_values_of() -> None:
    mean = {"null_space_r2/color: red": 0.2, "null_space_r2/color: blue": 0.4, "features_r2/size: small": 1.0, "harmless_r2": 9.0}
    found = attribute_groups(mean)
    assert found == {"color": {"null_space": pytest.approx(0.3)}, "size": {"features": 1.0}}


def test_a_report_goes_to_json_and_back_and_readme_says_the_same(tmp_path: Any) -> None:
    points = [AgreementPoint(10, 0.5, [0.6, 0.61], [5.0, 5.2])]
    runs = [run("plain", 0, "baseline"), run("sing", 0, harm=1.0), ArmRun("dropped", "baseline", "none", "", 0, None, {"top1": 0.9})]
    report = study_report(
        runs, reference="plain", claim="sing", agreement=points, settings={"name": "s", "command": "recipes/study.py"},
        machine={"cores": 2, "processor": "p", "device": "cpu", "torch": "2"}, seconds={"sing": 120.0},
    )  # fmt: skip
    back = StudyReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False)))
    assert study_markdown(back, {name: tmp_path / f"{name}.png" for name in ("study", "pareto", "tradeoff")}) == study_markdown(
        report, {name: tmp_path / f"{name}.png" for name in ("study", "pareto", "tradeoff")}
    )
    text = study_summary(back, "s")
    assert "sing (the arm named beforehand)" in text
    assert "`recipes/study.py` on 2 cores (p), cpu, torch 2; 2 minutes" in text
    assert "| sing | 1 " in " ".join(text.split())
    with pytest.raises(ValueError, match="format 2, but of 7"):
        StudyReport.from_json({"format": 7})
