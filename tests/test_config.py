"""Configurations: read from YAML and flags, all their mistakes shown at once, written so that they read the same."""

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from singreg.config import FinetuneConfig, ModelConfig, RunConfig, overridden, parse
from singreg.parsing import dump


@dataclass
class Listed(RunConfig):
    """A configuration with a list of sections.

    Args:
        models: classifiers.
    """

    models: list[ModelConfig] = field(default_factory=list)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, kind: type = FinetuneConfig) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        parse(kind, arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return [line[4:] for line in said.splitlines() if line.startswith("  - ")]


def written(folder: Path, text: str) -> str:
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    return str(folder / "c.yaml")


def test_files_and_flags_apply_in_order(tmp_path: Path) -> None:
    file = written(tmp_path, "training: {epochs: 7, batch_size: 8}\nloss: {terms: {readout: 2}}\n")
    config = parse(FinetuneConfig, ["--config", file, "--training.epochs", "3", "--loss.terms.capacity", "1"])
    assert (config.training.epochs, config.training.batch_size) == (3, 8)
    assert config.loss.terms == {"readout": 2.0, "capacity": 1.0}
    assert config.model == ModelConfig()


def test_dump_reads_back_as_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(FinetuneConfig, ["--data.scenes.test", "50", "--vlm.templates", '["a {class}", "the {class}"]'])
    assert parse(FinetuneConfig, ["--config", written(tmp_path, dump(config))]) == config
    models = parse(Listed, ["--models", "[{name: a}, {name: b, head: keep}]"])
    assert [model.head for model in models.models] == ["auto", "keep"]
    assert parse(Listed, ["--config", written(tmp_path, dump(models))]) == models
    with pytest.raises(SystemExit):
        parse(Listed, ["--print_config", "--config", written(tmp_path, dump(models))])
    assert capsys.readouterr().out == dump(models)


def test_all_mistakes_are_shown_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(
        tmp_path,
        "ot: x\ndata: {scenes: {trai: 2, bias: 1.6}, workers: -1}\nloss: {terms: {leek: 2}, weight: heavy}\n"
        "training: {epochs: 4.5, batch_size: null}\n",
    )
    found = refusal(capsys, "--config", file, "--seed", "-3", "--training.epoch", "4", "--config", "/nowhere.yaml")
    keys = [line.partition(":")[0] for line in found]
    wanted = ["ot", "loss.weight", "training.epochs", "training.epoch", "data.scenes.trai", "data.scenes.bias"]
    wanted += ["data.workers", "loss.terms.leek", "training.batch_size", "seed", "--config"]
    assert sorted(keys) == sorted(wanted)
    assert any("did you mean training.epochs" in line for line in found)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--loss.terms", "{readout: 0, capacity: 0}"], "loss.terms"),
        (["--vlm.templates", "[an image]"], "vlm.templates"),
        (["--vlm.templates", "[]"], "vlm.templates"),
        (["--data.unlabeled", "x"], "data.source"),
        (["--data.per_class", "{train: 0}"], "data.per_class.train"),
        (["--data.unlabeled_to_audit", "2"], "data.unlabeled_to_audit"),
        (["--training.learning_rate", "0"], "training.learning_rate"),
        (["--translator.ridge", "-1"], "translator.ridge"),
        (["--loss.floor", "-1"], "loss.floor"),
        (["--loss.placebo", "foreigner"], "loss.placebo"),
        (["--out", ""], "out"),
        (["--data.augmentation", "cutmix"], "data.augmentation"),
    ],
)
def test_bad_values_are_refused_by_name(arguments: list[str], key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert any(line.startswith(f"{key}:") for line in refusal(capsys, *arguments))


@pytest.mark.parametrize(("rank", "problems"), [("0", 1), ("1", 0)])
def test_one_process_says_what_is_wrong(rank: str, problems: int, capsys: pytest.CaptureFixture[str]) -> None:
    with patch.dict("os.environ", LOCAL_RANK=rank):
        assert len(refusal(capsys, "--seed", "x")) == problems


def test_a_section_that_stands_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML itself would keep the last one without a word."""
    file = written(tmp_path, "loss: {weight: 1}\ntraining: {epochs: 1}\nloss: {floor: 1}")
    assert "listed twice: loss" in refusal(capsys, "--config", file)[0]


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "text", None])
def test_what_is_no_configuration_is_refused(text: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also a file that is not there but is called as one of the package's."""
    file = str(tmp_path / "elsewhere" / "demo.yaml") if text is None else written(tmp_path, text)
    (line,) = refusal(capsys, "--config", file)
    assert file in line


def test_words_stand_for_sections_and_paths_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/anna")
    data = ["--data.source", "~/images", "--data.classes", "[~/list, x]"]
    config = parse(Listed, ["--models", "~/a,local-dir:~/b,c~d", "--out=~/run", *data])
    assert [model.name for model in config.models] == ["/anna/a", "local-dir:/anna/b", "c~d"]
    assert (config.out, config.data.source) == ("/anna/run", "/anna/images")
    assert config.data.classes == ["/anna/list", "x"]
    mixed = parse(Listed, ["--models", "[a, {name: b, head: keep}]"])
    assert [(model.name, model.head) for model in mixed.models] == [("a", ModelConfig().head), ("b", "keep")]


@pytest.mark.parametrize(
    ("encoding", "wanted"),
    [("ascii", "AS_neg 3 deg \\u732b"), ("latin-1", "AS_neg 3° \\u732b"), ("utf-8", "AS⁻ 3° 猫")],
)
def test_output_that_is_not_utf8_gets_ascii_names(encoding: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so do bytes of a file's name that are no UTF-8, which UTF-8 itself cannot write."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stream)
    parse(FinetuneConfig, [])
    print("AS⁻ 3° 猫", os.fsdecode(b"caf\xe9"), end="", flush=True)
    assert stream.buffer.getvalue().decode(encoding) == f"{wanted} caf\\udce9"  # type: ignore[attr-defined]


def test_overridden_copies_with_other_values() -> None:
    config = FinetuneConfig()
    changed = overridden(config, {"loss.weight": 0.5, "loss.terms.readout": 3, "training.l2_sp": 1})
    assert (changed.loss.weight, changed.loss.terms, changed.training.l2_sp) == (0.5, {"readout": 3.0}, 1.0)
    assert config == FinetuneConfig()
    with pytest.raises(ValueError, match=r"(?s)loss\.weigh: no such key.*training\.epochs: expected int"):
        overridden(config, {"loss.weigh": 0.5, "training.epochs": "x"})
    with pytest.raises(ValueError, match=r"got 'linear' \(cosine, tanh, .*, constant\)$"):  # all of many choices
        overridden(config, {"training.schedule": "linear"})


def test_finetune_has_at_most_45_options_and_each_has_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(FinetuneConfig, ["--help"])
    text = capsys.readouterr().out
    options = [line for line in text.splitlines() if line.startswith("  --") and "config" not in line.lower()]
    assert 40 <= len(options) <= 45
    assert "(type: str, default: null)" not in text.replace("\n", " ").split("--seed")[0]
