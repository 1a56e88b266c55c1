"""The pixel attack's recipe on tiny scenes: whole, killed and resumed, without a null space, and on bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.transforms.functional import to_tensor

from recipes.steer import main
from singreg.analysis.pixels.ascent import LAGRANGIAN, TANGENT
from singreg.analysis.pixels.features import feature_rules, gain_over_single
from singreg.analysis.pixels.results import PixelReport
from singreg.analysis.old_robustness.attacks import MAXIMISER
from singreg.analysis.old_robustness.results import RobustnessFigures
from singreg.analysis.old_robustness.sanity import ATTACK_LOG, FEATURES, FILES
from singreg.data.datasets import ImageSplit, TableSplit
from singreg.evaluation import steer_pixels
from singreg.evaluation.steer_pixels_bench import choose_pictures
from singreg.evaluation.steer_pixels_config import asks_for_pixels, parse_pixels
from singreg.evaluation.steer_pixels_kept import made_from, read_kept
from singreg.reporting.readme import main as write_readme
from singreg.utils import write_json
from tests.analysis.robustness import robust
from tests.demo import ASSETS

ROOT = Path(__file__).parents[2]
TINY = [
    "--attack", "pixels",
    "--data.scenes_train", "90", "--data.scenes_audit", "80", "--data.scenes_test", "50", "--data.scenes_bank", "10",
    "--translator.ridge", "1", "--auditor.ridge", "1", "--pictures", "6", "--attack_batch", "3", "--linf", "[2, 8]", "--tau", "0.5",
    "--steps", "16", "--restarts", "2", "--hold_pictures", "2", "--robust", "[1, 4]", "--robust_steps", "3", "--twin_pictures", "40",
    "--models", '[{"name": "demo"}]',
]  # fmt: skip
TWO = '[{"name": "demo"}, {"name": "demo", "drop_null": true}]'


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(runs: Path, cache: Path, *more: str) -> None:
    AcceleratorState._reset_state(True)
    try:
        main(["--runs", str(runs), "--cache", str(cache), *TINY, *more])
    finally:
        AcceleratorState._reset_state(True)


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    for name in ("seconds", "settings", "machine"):
        report.pop(name)
    for figures in report["features"].values():
        figures["seconds"] = 0.0
    return report


def test_the_recipe_from_end_to_end(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, cache, "--name", "whole", "--models", TWO)
    folder, shown = tmp_path / "whole", capsys.readouterr().out
    report = report_of(folder)
    assert report["kind"] == "steer pixels"
    assert [(m["label"], m["nullity"]) for m in report["models"]] == [("demo", 246), ("demo without null space", 0)]
    names = [check["name"] for check in report["checks"]]
    for rule in (
        "no budget, no success", "a larger budget reaches", "many steps reach", "white box reaches", "a random direction is far below",
        "logits stay within", "the decision stays", "every displacement is within", "dropping the null space changes nothing in pixels",
    ):  # fmt: skip
        assert any(name.startswith(rule) for name in names), rule
    assert [c for c in report["checks"] if not c["passed"]] == []
    assert report["findings"][0].startswith(f"All {len(names)} sanity checks passed")
    counts = Counter(check["read"] for check in report["checks"])
    assert f"{counts[FILES]} read from the saved 8-bit files, {counts[FEATURES]} from features in memory" in report["findings"][0]
    assert counts[FILES] > counts[ATTACK_LOG] > 0
    assert sum("the passes climb by themselves" in name for name in names) == 4
    assert {c["kind"] for c in report["climbs"]} == {TANGENT, LAGRANGIAN}
    assert "class-prompt cosines are held in the opposite direction (demo, from the saved 8-bit files)" in names
    assert any("class-prompt cosines held within 0.02" in sentence for sentence in report["findings"])
    assert not any("meaning held" in sentence for sentence in report["findings"])
    assert "lower bounds" in shown
    assert any("1 of 1 do" in s or "0 of 1 do" in s for s in report["findings"])  # one encoder is no witness of meaning
    assert all(s["readings"]["changed meaning"][0] == 0 for s in report["summaries"])
    assert "success is exactly 0 (features of demo without null space)" in names
    features_are_steered_too(folder, report)
    pictures_can_be_judged_again(folder)
    files_are_there(folder)
    readme_says_it(tmp_path, folder, report)


def features_are_steered_too(folder: Path, report: dict[str, Any]) -> None:
    """The same pictures in feature space: the maximiser at least the single step, and exactly nothing where the null space is dropped."""
    figures = {label: RobustnessFigures.from_json(value) for label, value in report["features"].items()}
    assert list(figures) == ["demo", "demo without null space"]
    assert all(f.images == 6 and len(f.targets) == 10 for f in figures.values())
    factor = gain_over_single(figures["demo"])
    assert factor is not None
    assert factor >= 1
    assert any(f"Many steps turn features {factor:.2f} times as far" in sentence for sentence in report["findings"])
    (dropped,) = (s for s in report["findings"] if s.startswith("demo without null space, in feature space"))
    assert "by exactly null directions success is exactly 0 at every step" in dropped
    assert "near-null 100 %, τ 0.5:" in dropped
    soft = figures["demo without null space"].curve("near-null 100 %, τ 0.5", judge="fitted", defence="drop_null")
    assert 0 < max(soft.logit_change) <= 0.5
    reasons = figures["demo"].absent  # a reason that nobody reads hides an attack
    text = (folder / "report.md").read_text()
    assert all(reason.replace("%", "%") in text for reason in reasons.values())
    curve = figures["demo"].curve(MAXIMISER, crafted_on="fitted", judge="fitted")
    assert curve.at(0.4, "success") > 0.5  # the control of that 0


def pictures_can_be_judged_again(folder: Path) -> None:
    """Every attacked picture is logged, and plain timm reads the very logits that were written down."""
    rows = json.loads((folder / "attacked.json").read_text())
    assert len(rows) == 2 * (6 * 2 * 3 + 3 + 3 + 2)  # both budgets and three arms, the two controls, the opposite direction
    attacked = [row for row in rows if row["attacked"]["arm"] == "attack"]
    assert all(row["kept"] for row in attacked)
    assert all(row["attacked"]["target"] != row["attacked"]["label"] for row in rows)
    assert list(attacked[0]["rise"]) == ["fitted", "auditor", "demo"]
    # Anyone can judge them again: plain timm reads the very logits that were written down.
    plain = timm.create_model(f"local-dir:{ASSETS / 'demo_classifier'}", pretrained=True).eval()
    mean, std = (torch.tensor(plain.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    row = max(attacked, key=lambda row: row["logit_change"])
    with torch.no_grad():
        logits = [
            plain((to_tensor(Image.open(folder / row["attacked"][name]))[None] - mean) / std)[0] for name in ("original", "file")
        ]
    assert float((logits[1] - logits[0]).abs().max()) == pytest.approx(row["logit_change"], abs=1e-3)


def files_are_there(folder: Path) -> None:
    """Figures, page and TensorBoard."""
    for name in ("rises", "attacked", "robustness", "features", "feature_pairs"):
        assert (folder / "plots" / f"{name}.png").is_file()
    text = (folder / "report.md").read_text()
    assert "## Sanity checks" in text
    assert "## The opposite direction" in text
    assert "fooled the VLM" in (folder / "report.html").read_text()
    tags = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0}).Reload().Tags()
    assert "rise/fitted/demo" in tags["scalars"]
    assert "success in feature space/auditor/demo" in tags["scalars"]
    assert "plots/attacked" in tags["images"]


def readme_says_it(tmp_path: Path, folder: Path, report: dict[str, Any]) -> None:
    """README's block comes from the report alone."""
    readme = tmp_path / "README.md"
    readme.write_text("before <!-- begin generated: p --><!-- end generated: p --> after")
    write_readme([str(readme), f"p={folder}"])
    said, kept = readme.read_text(), json.loads((tmp_path / ".github" / "p.json").read_text())
    assert kept["findings"] == report["findings"]
    assert "rows" not in kept
    rise = report["summaries"][0]["rise"]["auditor"]
    assert f"{rise[0]:.1f} [{rise[1]:.1f}, {rise[2]:.1f}]" in said
    curve = RobustnessFigures.from_json(report["features"]["demo"]).curve(MAXIMISER, crafted_on="fitted", judge="fitted")
    success = 100 * curve.area["success"][0]
    assert f"{success:.0f} [" in said
    assert (tmp_path / ".github" / "p-rises.png").is_file()


def test_a_killed_run_goes_on_and_finds_the_same(tmp_path: Path, cache: Path) -> None:
    quick = ["--steps", "4", "--feature_pairs", "20"]
    run(tmp_path, cache, "--name", "whole", *quick)
    calls = []
    original = steer_pixels.attack_batch

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["number"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with patch.object(steer_pixels, "attack_batch", killed), pytest.raises(KeyboardInterrupt):
        run(tmp_path, cache, "--name", "killed", *quick)
    assert not (tmp_path / "killed" / "report.json").exists()
    calls.clear()
    with patch.object(steer_pixels, "attack_batch", lambda *a, **k: calls.append(k["number"]) or original(*a, **k)):
        with patch.object(steer_pixels, "made_from", lambda *_: {"classifier": "another"}), pytest.raises(SystemExit) as stopped:
            run(tmp_path, cache, "--name", "killed", "--resume", "true", *quick)
        assert "features.json was made from something else" in str(stopped.value)
        assert "another --name, or delete the folder" in str(stopped.value)
        assert calls == []
        run(tmp_path, cache, "--name", "killed", "--resume", "true", *quick)
    assert calls == [1]  # the first batch was there
    whole, resumed = (report_of(tmp_path / name) for name in ("whole", "killed"))
    assert resumed == whole
    for path in (tmp_path / "whole" / "attacked").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes(), path
    with pytest.raises(SystemExit, match="already holds a run"):
        run(tmp_path, cache, "--name", "whole", *quick)


def test_what_other_weights_or_pictures_made_is_not_taken_over(tmp_path: Path) -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    parts = SimpleNamespace(**{name: SimpleNamespace(fingerprint=name) for name in ("bank", "audit", "test")})
    made, path = made_from(model, parts, "vlm"), tmp_path / "batch-0000.json"
    assert read_kept(path, made) is None
    write_json(path, {"x": 1, "made_from": made})
    assert read_kept(path, made_from(model, parts, "vlm")) == {"x": 1, "made_from": made}
    with pytest.raises(SystemExit, match=r"batch-0000\.json was made from something else .*unknown: classifier\).*another --name"):
        read_kept(path, made_from(other, parts, "vlm"))
    parts.bank = SimpleNamespace(fingerprint="more")
    with pytest.raises(SystemExit, match=r"unknown: bank pictures, vision-language model\)"):
        read_kept(path, made_from(model, parts, "another"))
    write_json(path, {"x": 1})
    with pytest.raises(SystemExit, match="unknown: classifier, bank pictures"):
        read_kept(path, made)


def test_tf32_is_off_for_the_job_only() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        with steer_pixels.full_float32():
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_without_twins_there_is_a_report_and_it_says_so(tmp_path: Path, cache: Path) -> None:
    more = ["--steps", "1", "--restarts", "1", "--hold_pictures", "0", "--feature_steps", "[]", "--pictures", "3", "--twin_pictures", "2"]
    run(tmp_path, cache, "--name", "few", *more)
    report = report_of(tmp_path / "few")
    assert report["twins"] == []
    assert any("no natural twins were sought among 2 test pictures" in warning for warning in report["warnings"])
    assert not (tmp_path / "few" / "plots" / "twins.png").exists()


def test_a_dry_run_makes_nothing(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, cache, "--dry_run", "true", "--models", TWO)
    shown = capsys.readouterr().out
    assert "demo without null space: one picture (3, 64, 64) gives features (1, 256), logits (1, 10)" in shown
    assert "budgets: linf 2/255, linf 8/255" in shown
    assert list(tmp_path.iterdir()) == []


def test_bad_values_are_shown_together(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [
        "--linf", "[0, 8]", "--robust", "[4, 1]", "--tau", "0", "--severity", "9", "--targets", '["star", "star"]', "--l2", "[-1]",
        "--models", '[{"name": "demo"}, {"name": "demo"}, {"name": "demo", "label": "auditor"}]', "--feature_steps", "[0.1, 100.0]",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, cache, *more)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    for part in (
        "linf: a budget of 0 allows no change at all",
        "robust: expected different budgets in rising order",
        "tau: expected a number above 0",
        "severity: expected 1 to 5",
        "targets: listed twice: star",
        "l2: expected numbers above 0",
        "models: listed twice: demo",
        "models[2].label: 'auditor' is what a translator is called",
        "feature_steps: expected shares of the feature norm below 100",
    ):
        assert part in shown, part
    assert "9 problem(s)" in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--models", '[{"name": "test_resnet", "pretrained": false, "head": "new", "drop_null": true, "label": "x"}]'], None),
        (["--models", '[{"name": "no_such_model"}]'], "neither a folder nor a model"),
        (["--targets", "star", "--pictures", "50"], "star is the only target of its own pictures; a target must not equal the source"),
        (["--targets", "stra"], "stra"),
    ],
)  # fmt: skip
def test_what_cannot_be_attacked_is_said_before_any_work(tmp_path: Path, cache: Path, more: list[str], message: str | None) -> None:
    if message is None:  # an untrained head of 10 rows on 96 features has a null space to drop
        run(tmp_path, cache, *more, "--dry_run", "true")
        return
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, cache, *more)
    assert list(tmp_path.iterdir()) == []


def test_a_head_without_a_null_space_is_attacked_and_cannot_lose_what_it_lacks(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = '{"name": "test_resnet", "pretrained": false, "head": "keep", "label": "full"'
    with pytest.raises(SystemExit, match=r"models\[0\] \(full\): .*null"):
        run(tmp_path, cache, "--models", f'[{full}, "drop_null": true}}]')
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_one_colour_are_left_out_and_named(tmp_path: Path) -> None:
    paths = []
    for place, colour in enumerate(["red", "blue", None, None]):
        path = tmp_path / f"{place}.png"
        noise = np.random.default_rng(place).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        (Image.new("RGB", (8, 8), colour) if colour else Image.fromarray(noise)).save(path)
        paths.append(str(path))
    part: ImageSplit = TableSplit.from_files("test", paths, ["a", "b"], [0, 1, 0, 1])
    chosen = choose_pictures(part, 4, "all", seed=0)
    assert sorted(chosen.indices.tolist()) == [2, 3]
    assert sorted(chosen.left_out) == paths[:2]
    assert (chosen.targets != chosen.labels).all()
    with pytest.raises(ValueError, match="of one colour: nothing is to be seen"):
        choose_pictures(part.subset([0, 1]), 4, "all", seed=0)


def test_pictures_are_chosen_evenly_and_the_same_every_time(tmp_path: Path) -> None:
    class Noise(ImageSplit):
        def image(self, index: int) -> Image.Image:
            return Image.fromarray(np.random.default_rng(index).integers(0, 255, (4, 4, 3), dtype=np.uint8))

        def identifier(self, index: int) -> str:
            return str(index)

    labels = np.array([0] * 30 + [1] * 5 + [2] * 5 + [-1] * 5)
    part = Noise("test", list("abc"), labels, np.zeros((45, 32), dtype=np.uint8))
    chosen, again = (choose_pictures(part, 9, "all", seed=3) for _ in range(2))
    assert np.bincount(chosen.labels).tolist() == [3, 3, 3]
    assert (chosen.indices == again.indices).all()
    assert (chosen.targets == again.targets).all()
    assert set(choose_pictures(part, 40, ["b", "c"], seed=3).targets.tolist()) == {1, 2}


def test_shipped_configurations_parse_and_are_told_from_those_of_features(tmp_path: Path) -> None:
    real, scenes = (parse_pixels(["--config", name]) for name in ("steer_pixels", "steer_pixels_scenes"))
    assert [model.known_as for model in real.models] == ["pretrained", "control", "SingLoss", "null dropped"]
    assert (real.pictures, [b.label for b in real.budgets]) == (128, ["linf 2/255", "linf 8/255"])
    assert [model.known_as for model in scenes.models] == ["demo", "demo without null space"]
    assert asks_for_pixels(["--config", "steer_pixels"])
    assert asks_for_pixels(["--config=steer_pixels_scenes"])
    assert not asks_for_pixels(["--config", "steer_demo", "--name", "attack"])
    assert not asks_for_pixels(["--config", str(tmp_path / "missing.yaml")])


def test_rules_of_feature_curves_are_gathered_and_a_failure_is_named() -> None:
    found = robust.usual()
    report = PixelReport([], 1.0, 1, {}, [], [], [], [], [], [], [], [], [], {}, {}, {}, features={"A": found, "B": found}, dropped=["B"])
    rules = feature_rules(report)
    assert all(rule.passed for rule in rules)
    assert len([rule for rule in rules if "features of A" in rule.name]) == len({c.name.partition(" (")[0] for c in found.checks})
    assert [rule.name for rule in rules if "features of B" in rule.name] == ["success is exactly 0 (features of B)"]
    broken = replace(found, checks=[replace(found.checks[0], passed=False), *found.checks[1:]])
    failed = [rule for rule in feature_rules(replace(report, features={"A": broken})) if not rule.passed]
    assert failed == [replace(broken.checks[0], name=f"{broken.checks[0].name} (features of A)")]


@pytest.mark.slow
def test_two_processes_attack_as_one_does(tmp_path: Path, cache: Path) -> None:
    """A batch a process: the same pictures, rises and checks; three batches, so that one process has none left at the end."""
    flags = [*TINY, "--runs", str(tmp_path), "--cache", str(cache), "--attack_batch", "2"]
    for name, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        command = [sys.executable, *launch, str(ROOT / "recipes" / "steer.py"), *flags, "--name", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "report.json").read_text())["machine"]["processes"] == 2  # it did start its second
    one, two = (json.loads((tmp_path / name / "attacked.json").read_text()) for name in ("one", "two"))
    assert [row["attacked"]["file"] for row in two] == [row["attacked"]["file"] for row in one]
    assert [row["kept"] for row in two] == [row["kept"] for row in one]
    for a, b in zip(one, two, strict=True):
        assert b["rise"] == pytest.approx(a["rise"], abs=0.5)  # a search of float32 steps, on another number of threads
    checks = [[(c["name"], c["passed"]) for c in report_of(tmp_path / name)["checks"]] for name in ("one", "two")]
    assert checks[0] == checks[1]
