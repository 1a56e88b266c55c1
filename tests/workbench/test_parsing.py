"""Configurations: every mistake in one message, overrides, what is printed parses again; every shipped file is sound."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from singreg.evaluation.analyze_config import parse_analyze
from singreg.evaluation.compare_config import parse_compare
from singreg.evaluation.steer_config import parse_steer
from singreg.evaluation.steer_pixels_config import asks_for_pixels, parse_pixels
from singreg.loss_terms import PRESETS, TERMS
from singreg.training.config import FinetuneConfig, parse_finetune
from singreg.training.study_config import parse_study
from singreg.workbench.parsing import ConfigurationError, build, dump_config, find_config, overridden

CONFIGS = Path(__file__).parents[2] / "configs"


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], parse: Callable[..., Any] = parse_finetune) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_all_mistakes_are_shown_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(
        "trainig: {epochs: 2}\ntraining: {epochs: many, batch_size: 0}\nvlm: {templates: [a picture]}\nloss: {terms: {leek: 1}}\n"
    )
    said = refused(capsys, ["--config", str(file), "--data.workers", "-1", "--nmae", "x", "--loss.warmup=0.9", "--loss.ramp=0.9"])
    for words in [
        "trainig: no such key; did you mean training?", "training.epochs: expected int, got 'many'",
        "training.batch_size: expected a number above 0, got 0", "'a picture' has no \"{class}\"", "loss.terms.leek: no such term",
        "workers must be at least 0, got -1", "nmae: no such key; did you mean name?", "loss.warmup + loss.ramp",
    ]:  # fmt: skip
        assert words in said, words
    assert "has 8 problem(s)" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a list", "expected a mapping"),
        ("training: 3", "training: expected a mapping"),
        ("name: !!python/object/apply:os.system ['true']", "python/object"),
        ("a: [1", "expected"),
        ("data: {image_size: -3}", "image_size must be at least 1"),
    ],
)
def test_files_that_are_no_configuration(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    assert words in refused(capsys, ["--config", str(file)])
    assert words in refused(capsys, [f"--config={file}"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: {epochs: 3}\nloss: {weight: 1}\ntraining: {batch_size: 4}\n", "listed twice: training"),
        ("training:\n  epochs: 3\n  epochs: 4\n", "line 2: listed twice: epochs"),
        ("# nothing but this\n", "got an empty file"),
        ("training:\n", "training: expected a mapping of keys to values, got NoneType"),
        ("1: 2\n", "1: no such key"),
        ("config: demo.yaml\n", "config: no such key"),
        ("training: {mixed_precision: no}\n", 'write it in quotes: "no"'),
    ],
)
def test_files_that_say_less_than_they_seem_to(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    assert words in refused(capsys, ["--config", str(file)])


def test_a_complaint_about_yaml_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("name: [a\n", "name: !!python/name:os.system\n", "training: {epochs: 1, epochs: 2}\n", "name: \x01\n"):
        (tmp_path / "odd.yaml").write_text(text)
        assert str(tmp_path / "odd.yaml") in refused(capsys, ["--config", str(tmp_path / "odd.yaml")])


def test_nothing_in_a_file_or_flag_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{tmp_path / 'touched'}']]"
    (tmp_path / "evil.yaml").write_text(f"name: {evil}\n")
    refused(capsys, ["--config", str(tmp_path / "evil.yaml")])
    refused(capsys, ["--name", evil])
    refused(capsys, ["--training.epochs", evil])
    refused(capsys, ["--training", evil])
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--training.epochs"], "training.epochs"),
        (["--config"], "--config: expected a YAML file"),
        (["--config", ""], "--config: expected a YAML file"),
        (["epochs", "3"], "unrecognized arguments: epochs 3"),
        (["--training.epohcs=3"], "did you mean training.epochs?"),
        (["--training", '{"epohcs": 3}'], "training.epohcs: no such key; did you mean training.epochs?"),
        (["--training", "3"], "training: expected a mapping"),
        (["--vlm.templates", "[a {class}]"], "vlm.templates: '[a {class}]' is not valid YAML"),
        (["--training.learning_rate", ".inf"], "training.learning_rate: expected a number above 0, got inf"),
        (["--loss.weight", ".nan"], "loss.weight: expected a number of at least 0, got nan"),
        (["--loss.terms.leak", ".nan"], "loss.terms.leak: expected a finite weight of at least 0 (0 removes the term), got nan"),
        (["--loss.terms.leak", "much"], "loss.terms: expected dict[str, float]"),
        (["--seed", "-1"], "seed: expected a whole number from 0"),
        (["--seed", "4294967296"], "seed: expected a whole number from 0 to 4294967295"),
        (["--name", "a/b"], "name: expected a folder name, got 'a/b'"),
        (["--name", ".."], "name: expected a folder name"),
        (["--data.augmentation", "flop"], "data.augmentation: expected Literal['none', 'flip', 'timm'], got 'flop'"),
    ],
)
def test_flags_that_cannot_be_meant(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, arguments)
    assert words in said
    assert "run with --help" in said


def test_flags_are_text_where_text_is_wanted() -> None:
    given = {"name": "2024", "data.unlabeled": "12", "data.classes": "5", "vlm.pretrained": "yes", "data.source": "1e3", "runs": "a: b"}
    config = parse_finetune([word for key, value in given.items() for word in (f"--{key}", value)])
    data = config.data
    assert (config.name, data.unlabeled, data.classes, config.vlm.pretrained) == ("2024", "12", "5", "yes")
    assert (data.source, config.runs) == ("1e3", "a: b")
    assert parse_finetune(["--data.unlabeled", "null"]).data.unlabeled is None
    assert parse_finetune(["--training.mixed_precision", "no"]).training.mixed_precision == "no"
    assert parse_finetune(["--training.learning_rate", "1e-4"]).training.learning_rate == 1e-4


def test_single_entries_lists_and_whole_sections_can_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("loss: {terms: {leak: 1.0, hinge: 3.0}}\ndata: {classes: [cat, dog]}\n")
    flags = ["--loss.terms.leak", "2", "--data.classes", '["fish"]', "--training", '{"epochs": 9, "keep": 3}']
    config = parse_finetune(["--config", str(tmp_path / "a.yaml"), *flags])
    assert config.loss.terms == {"leak": 2.0, "hinge": 3.0}
    assert config.data.classes == ["fish"]
    assert (config.training.epochs, config.training.keep, config.training.batch_size) == (9, 3, FinetuneConfig().training.batch_size)


def test_a_file_that_is_not_there_lists_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert "demo.yaml" in refused(capsys, ["--config", "demoo.yaml"])
    assert find_config("demo") == find_config("demo.yaml") == CONFIGS / "demo.yaml"


def test_flags_override_files_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("training: {epochs: 7, batch_size: 8}\nloss: {terms: {leak: 2.0}}\n")
    (tmp_path / "b.yaml").write_text("training: {epochs: 9}\n")
    both = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    config = parse_finetune([*both, "--training.learning_rate", "0.5", "--vlm.templates", '["a {class}", "the {class}"]'])
    assert (config.training.epochs, config.training.batch_size, config.training.learning_rate) == (9, 8, 0.5)
    assert config.loss.terms == {"leak": 2.0}
    assert config.vlm.templates == ["a {class}", "the {class}"]
    assert parse_finetune(["--loss.terms", "{capacity: 3}"]).loss.terms == {"capacity": 3}


def test_what_is_printed_and_dumped_parses_to_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = parse_finetune(["--config", "demo", "--training.epochs", "3"])
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert parse_finetune(["--config", str(tmp_path / "dumped.yaml")]) == config
    with pytest.raises(SystemExit) as stop:
        parse_finetune(["--config", "demo", "--training.epochs", "3", "--print_config"])
    assert stop.value.code in (0, None)
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse_finetune(["--config", str(tmp_path / "printed.yaml")]) == config


def test_dotted_keys_replace_values_in_a_copy_and_bad_ones_are_collected() -> None:
    config, problems = FinetuneConfig(), []  # type: ignore[var-annotated]
    values = {"loss.weight": "3e-2", "loss.terms.leak": 2, "training.epochs": 7, "loss.wieght": 1, "training.keep": "many"}
    found = overridden(config, values, problems)
    assert (found.loss.weight, found.loss.terms, found.training.epochs) == (0.03, {"leak": 2.0}, 7)
    assert [problem.partition(":")[0] for problem in problems] == ["loss.wieght", "training.keep"]
    assert config == FinetuneConfig()
    assert overridden(config, {}, problems) == config
    assert overridden(config, {"loss.terms": {"hinge": 1}}, problems).loss.terms == {"hinge": 1.0}


def test_build_is_the_inverse_of_asdict_and_raises_without_a_list_for_problems() -> None:
    config = FinetuneConfig()
    assert build(FinetuneConfig, dataclasses.asdict(config)) == config
    values = dataclasses.asdict(config)
    values["data"]["workers"] = -1
    with pytest.raises(ValueError, match="workers must be at least 0"):
        build(FinetuneConfig, values)
    assert "2 problem" in str(ConfigurationError(["a", "b"]))


def option_texts(shown: str) -> dict[str, str]:
    """What --help says of every option, by its first name, without type and default."""
    found: dict[str, str] = {}
    body = shown[shown.index("\noptions:") :] if "\noptions:" in shown else shown
    for block in re.split(r"\n(?=  -)", body)[1:]:
        block = re.split(r"\n(?=\S)", block)[0]  # the next section's title is no text of this option
        head, _, rest = " ".join(block.split("\n\n")[0].split("\n")).strip().partition("  ")
        found[head.split()[0].rstrip(",")] = " ".join(rest.split()).partition("(type:")[0].strip()
    return found


RECIPES = [parse_finetune, parse_analyze, parse_steer, parse_compare, parse_study, parse_pixels]


@pytest.mark.parametrize("parse", RECIPES)
def test_every_option_of_every_recipe_has_a_text(parse: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    texts = option_texts(capsys.readouterr().out)
    assert {"--data.source", "--name", "--runs", "--vlm.pretrained"} <= texts.keys()
    assert len(texts) > 40
    assert not [name for name, text in texts.items() if not text]


def test_an_option_without_a_text_is_noticed() -> None:
    """The control of the test above."""
    shown = "usage\n\noptions:\n  --a A        of the run. (type: str)\n  --b B        (type: int)\n\nA part:\n  --c C\n"
    assert option_texts(shown) == {"--a": "of the run.", "--b": "", "--c": ""}


@pytest.mark.parametrize(("parse", "key"), [(parse_compare, "models"), (parse_compare, "further_vlms"), (parse_pixels, "models")])
def test_items_of_lists_have_a_help_of_their_own(parse: Callable[..., Any], key: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse([f"--{key}.help"])
    assert stop.value.code == 0
    assert f"--{key}.name NAME" in capsys.readouterr().out
    assert "runs.help: no such key" in refused(capsys, ["--runs.help"], parse)


@pytest.mark.parametrize("word", ["none", "None", "null"])
def test_none_means_null_where_null_is_allowed(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = ["--translator.ridge", "1", "--data.unlabeled", "folder"]
    config = parse_finetune([*before, "--translator.ridge", word, f"--data.unlabeled={word}", "--loss.placebo", "none"])
    assert (config.translator.ridge, config.data.unlabeled, config.loss.placebo) == (None, None, "none")
    assert parse_finetune(["--name", "none"]).name == "none"
    (tmp_path / "a.yaml").write_text(f"data: {{unlabeled: {word}}}\n")
    assert parse_finetune(["--config", str(tmp_path / "a.yaml")]).data.unlabeled is None


def test_a_file_with_none_for_a_number_is_told_to_write_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("translator: {ridge: none}\n")
    said = refused(capsys, ["--config", str(tmp_path / "a.yaml")])
    assert "translator.ridge: expected float | null, got 'none' (write null for \"not set\")" in said


def test_every_key_is_explained_by_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_finetune(["--help"])
    text = capsys.readouterr().out
    for key in ("--training.learning_rate", "--data.unlabeled_to_audit", "--loss.terms", "--auditor.images_per_feature", "--resume"):
        assert key in text
    assert "λ after the ramp" in text
    for name in [*PRESETS, *TERMS]:
        assert re.search(rf"\b{name}\b", text[text.index("--loss.preset") :]), name


PARSERS = {"analyze": parse_analyze, "steer": parse_steer, "compare": parse_compare, "paper": parse_compare, "study": parse_study}
SHIPPED = sorted(CONFIGS.glob("*.yaml"))


def test_how_many_configurations_are_shipped() -> None:
    assert [path.stem for path in SHIPPED] == [
        "analyze_demo", "analyze_imagenet16", "compare_demo", "compare_imagenet16", "demo", "imagenet100_resnet50", "imagenet16_lite0",
        "imagenet1k_vit", "imagenette_resnet50", "own", "paper", "steer_demo", "steer_imagenet16",
        "steer_pixels", "steer_pixels_scenes", "study_imagenet16", "study_scenes",
    ]  # fmt: skip


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_sound_and_says_its_command_and_hardware(path: Path) -> None:
    text = path.read_text()
    opening = [line for line in text.splitlines() if line.startswith("#")]
    expected = () if path.stem.startswith("steer_pixels") else ("Expected  ",)
    for words in ("Command   accelerate launch", "Hardware  ", *expected):
        assert any(words in line for line in opening), (path, words)
    parse = parse_pixels if asks_for_pixels(["--config", str(path)]) else PARSERS.get(path.stem.partition("_")[0], parse_finetune)
    config = parse(["--config", str(path)])
    assert yaml.safe_load(dump_config(config))["name"] == yaml.safe_load(text)["name"]


@pytest.mark.parametrize("name", ["imagenette_resnet50", "imagenet100_resnet50", "imagenet1k_vit"])
def test_the_models_of_hub_configurations_have_a_null_space_and_known_tags(name: str) -> None:
    import open_clip
    import timm
    import torch

    from singreg.data.classes import resolve_classes
    from singreg.models.classifier import Classifier

    config = parse_finetune(["--config", name])
    assert config.model.name in timm.list_pretrained(config.model.name.split(".")[0] + "*")
    assert config.vlm.pretrained in open_clip.list_pretrained_tags_by_model(config.vlm.name)
    with torch.device("meta"):
        width = Classifier.from_timm(config.model.name, pretrained=False).feature_dim
    classes = len(resolve_classes(config.data.classes)) if config.data.classes else 1000
    assert width > classes
    assert f"{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()
    assert "nobody has run it yet" in (CONFIGS / f"{name}.yaml").read_text()
