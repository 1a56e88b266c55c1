"""The pages: their Python runs, their commands exist, their figures come from the reports kept beside them."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch

from singreg.config import parse
from tests.test_configurations import configuration_of

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "recipes/README.md", "configs/README.md")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README = PAGES["README.md"]
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
GENERATED = r"<!-- begin generated.*?<!-- end generated[^\n]*"  # they name the command of their run, as it was then
OWN = re.sub(GENERATED, "", "\n".join(PAGES.values()), flags=re.DOTALL)
COMMANDS = sorted(set(re.findall(r"recipes/\w+\.py --config [^`\n|]+", OWN)))


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs", ROOT / ".github" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180
    assert len(README.encode()) <= 10_000


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_a_checkpoint_becomes_a_folder_that_names_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from singreg import Classifier

    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```py\n(.*?)```", PAGES["configs/README.md"], flags=re.DOTALL)
    trained = timm.create_model("resnet50", num_classes=16)
    torch.save({"state_dict": trained.state_dict()}, "model_best.pth.tar")
    found: dict[str, list[str]] = {}
    exec(compile(code, "README.md", "exec"), found)
    sliced = Classifier.from_timm("local-dir:mine", head_mode="slice", class_names=found["names"][::-1])
    assert torch.equal(sliced.weight, trained.fc.weight.flip(0))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_recipes_files_and_options_that_exist(command: str) -> None:
    recipe, *arguments = command.split()
    kind = configuration_of(Path(recipe).stem)
    given = [str(ROOT / word) if word.startswith("configs/") else word for word in arguments if word != "…"]
    assert isinstance(parse(kind, given), kind)


def test_generated_blocks_are_those_of_the_kept_reports() -> None:
    docs = generator()
    for page in docs.PAGES:
        assert docs.fill(page) == page.read_text(encoding="utf-8"), "run python .github/docs.py"


def test_links_and_images_are_there() -> None:
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"
