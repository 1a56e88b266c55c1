"""A study's arms against the reference: pairing, seeds, placebos, the verdict and figures, on rows made up for it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from singreg.analysis.comparison import HARM, Measured, compare_rows, words
from singreg.analysis.scores import AUDITED, AUDITOR, audited_columns, figures
from singreg.config import FinetuneConfig, LossConfig
from singreg.plots.scores import save_pareto
from singreg.study import ArmConfig
from singreg.study import results as analysis
from singreg.study.results import Summary, Work, pareto_front, study_warnings, summarize_study
from singreg.utils import plain

N = 200
FACTS = {"images": N, "classes": 7, "auditor_images": 700, "features": 100}
Run = tuple[Work, Measured]


def rows(seed: int, *, harm: float = 4.0, right: float = 0.9, loop: float | None = None) -> pd.DataFrame:
    """Class-score variance, AS⁻, |AS| and steering in proportion to harm; the rest stays."""
    base = np.random.default_rng(seed).gamma(4, 0.25, N)
    harmful = ("null scores", "cross", "self")
    audited = {name: base * (harm if name.startswith(harmful) else 5.0) for name in AUDITED}
    audited |= {"missed": base, "missed by rows": 2 * base, "harmless missed": 2 * base}
    scores = {f"AS/{AUDITOR}": -harm * base, "AS/loop": -(harm if loop is None else loop) * base}
    scores |= {f"centred AS/{AUDITOR}": -base, f"IS/{AUDITOR}": 40 * base, f"centred IS/{AUDITOR}": 40 * base}
    about = {"image": [f"image {i}" for i in range(N)], "label": np.arange(N) % 7, "correct": np.arange(N) < right * N}
    return pd.DataFrame({**about, **scores, **audited})


def run(name: str, seed: int = 0, *, about: Any = None, weight: float = 1.0, **options: Any) -> Run:
    config = FinetuneConfig(loss=LossConfig(weight=weight))
    source = Work(ArmConfig(), seed, config, None, "", Path()) if (about or {}).get("weights_from") else None
    work, found = Work(ArmConfig(name, **(about or {})), seed, config, source, "", Path()), rows(seed, **options)
    harm = float(figures({key: each.mean() for key, each in audited_columns(found).items()})[HARM])
    top1 = float(found["correct"].mean())
    intervals = {"top1": [top1 - 0.02, top1 + 0.02], HARM: [0.9 * harm, harm]}
    figures_of = {"figures": {"top1": top1, HARM: harm}, "intervals": intervals, "validation": {}}
    return work, (found.assign(by=""), figures_of)


def study(*more: Run) -> list[Summary]:
    plain_runs = [run("plain", seed, about={"role": "baseline"}, weight=0.0) for seed in (0, 1)]
    return summarize_study([*plain_runs, *more], "plain", "sing")


def sing(**options: Any) -> list[Run]:
    return [run("sing", seed, **{"harm": 1.0, **options}) for seed in (0, 1)]


def verdict(arms: list[Summary], **facts: int) -> list[str]:
    return analysis.study_verdict(arms, "plain", "sing", **{**FACTS, **facts})


def test_pairs_are_ratios_of_means_averaged_over_seeds() -> None:
    arm, reference = ({seed: rows(seed, harm=harm) for seed in (0, 1)} for harm in (1.0, 4.0))
    arm[1].loc[:49, f"AS/{AUDITOR}"] = 3.0  # benign there: no harm
    found = compare_rows(arm, reference)
    each = [[np.maximum(-of[s][f"AS/{AUDITOR}"], 0).mean() for s in (0, 1)] for of in (arm, reference)]
    assert found["AS_neg"]["value"] == pytest.approx(np.mean(each[0]) / np.mean(each[1]), rel=1e-12)
    assert found["AS_neg"]["low"] < found["AS_neg"]["value"] < found["AS_neg"]["high"]
    for figure, value in {HARM: 0.25, "cross 4 sd": 0.25, "IS": 1, "unique_r2": 1, "harmless_r2": 1}.items():
        assert [found[figure][end] for end in ("value", "low", "high")] == pytest.approx([value] * 3), figure


def test_a_gamed_loop_is_warned_of() -> None:
    gamed = study(*sing(harm=3.0, loop=0.0))
    assert study_warnings(gamed) == ["The loss was gamed (less than 67% confirmed): sing."]


def test_only_common_seeds_and_the_same_images_are_paired() -> None:
    found = compare_rows({1: rows(1, harm=2.0)}, {0: rows(0), 1: rows(1)})["AS_neg"]
    assert found["value"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="other images"):
        compare_rows({0: rows(0).assign(image=rows(0)["image"].to_numpy()[::-1])}, {0: rows(0)})


def test_means_and_spreads_over_seeds() -> None:
    found = study(*sing(), *[run("a", s, right=right) for s, right in ((0, 0.8), (1, 0.9))])[-1]
    assert (found["mean"]["top1"], found["spread"]["top1"]) == pytest.approx((0.85, np.std([0.8, 0.9], ddof=1)))
    arms = study(*sing(), run("b"))
    assert math.isnan(arms[-1]["spread"]["top1"])
    assert study_warnings(arms) == ["Of one seed only, so without a spread over seeds: b."]


def test_the_pareto_front_keeps_what_nothing_beats() -> None:
    points = {"good": (0.9, 1.0), "same": (0.9, 1.0), "accurate": (0.95, 3.0), "beaten": (0.9, 1.1)}
    assert pareto_front(points | {"worst": (0.1, 9.0)}) == {"good", "same", "accurate"}


def test_an_untrained_arm_is_compared_with_every_seed() -> None:
    arms = study(*sing(), run("edit", harm=1.0, about={"make": "align"}))
    found, fixed = arms[-1]["paired"]["AS_neg"], rows(0, harm=1.0)[f"AS/{AUDITOR}"].mean()
    assert found["value"] == pytest.approx(fixed / np.mean([rows(s)[f"AS/{AUDITOR}"].mean() for s in (0, 1)]))


def test_the_verdict_says_what_falls_at_what_price_and_which_placebo_fails() -> None:
    first, price, placebos = verdict(study(*sing()))
    assert "against plain: class-score variance in the null 0.25× [0.25, 0.25]" in first
    assert "all fall together (200 test images, auditor of 700 others, 2 seed(s))" in first
    # Not one of 200 images is decided otherwise, and half a point cannot be shown with 200 images.
    assert price.startswith("Top-1 is not shown to be kept: +0.00 points [-1.88, +1.88] (margin 0.5 points); IS 1.00×")
    few = verdict(study(*sing()), images=199)
    assert few[0].startswith("No claim: an interval from 199 test images of 7 classes means little")
    (said,) = verdict(study(*sing()), auditor_images=599)
    assert said.startswith("No claim: the auditor has 599 images, 600 are needed")
    close = verdict(study(*sing(harm=3.9)))[0]
    assert "not shown to fall: class-score variance in the null, AS⁻, |AS|, 4 sd step" in close  # too little to matter
    assert "no placebo arm" in placebos
    for harm, told in ((4.0, "random 0.25× [0.25, 0.25], fails"), (0.9, "does not fail")):
        arms = study(*sing(), *[run("random", s, harm=harm, about={"role": "placebo"}) for s in (0, 1)])
        assert told in verdict(arms)[2]
    same = verdict(study(*sing(harm=4.0, right=0.8)))
    assert "not shown to fall: class-score variance in the null, AS⁻, |AS|, 4 sd step" in same[0]
    assert "Top-1 is lost" in same[1]
    dropped = {"make": "drop", "weights_from": "plain", "role": "baseline"}
    lines = verdict(study(*sing(), *[run("null dropped", s, harm=0.0, about=dropped) for s in (0, 1)]))
    assert lines[3].startswith("The baseline to beat, null dropped, leaves nothing to steer through, with top-1 +0.00")
    assert len(lines) == 4


def test_the_curve_joins_arms_that_differ_in_weight_alone(tmp_path: Path) -> None:
    weaker = run("weaker", harm=2.0, weight=0.1, about={"overrides": {"loss.weight": 0.1}})
    other = run("other", harm=2.0, about={"overrides": {"loss.floor": 5}})
    arms = study(*sing(), weaker, other, run("before", about={"make": "leave"}))
    assert [arm["weight"] for arm in arms] == [0.0, 1.0, 0.1, None, None]
    assert json.loads(json.dumps(plain(arms), allow_nan=False))[0]["paired"] == {}
    figure = save_pareto(arms, "plain", tmp_path / "pareto.png")
    assert min(Image.open(figure.path).size) > 200


def test_what_rounds_to_nothing_has_no_sign() -> None:
    assert "-" not in words({"value": -1e-9, "low": -1e-8, "high": 0.0, "unit": "×"})
