"""Concept banks: what the package brings, users' files and lists, what is left out and counted, what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from singreg.data.classes import imagenet_names
from singreg.data.concepts import CONCEPTS_FOLDER, ConceptBank, concept_banks, embed_concepts, load_concepts


def test_the_banks_of_the_package_are_whole() -> None:
    assert concept_banks() == ("colours", "imagenet", "materials", "parts", "scenes", "textures")
    for name in concept_banks():
        bank = load_concepts(name)
        assert (bank.blank, bank.repeated) == (0, 0)
        assert set(bank.banks) == {name}
        assert 40 <= len(bank) <= 90 or name == "imagenet"
    assert load_concepts("imagenet").concepts == imagenet_names()
    written = [name for name in concept_banks() if name != "imagenet"]
    assert load_concepts(written).repeated == 0  # a word has one meaning, and one prompt, in all banks


def test_the_banks_are_part_of_what_is_installed() -> None:
    settings = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"concepts/*.txt"' in settings
    assert {path.suffix for path in CONCEPTS_FOLDER.iterdir()} == {".txt"}


def test_blank_and_repeated_lines_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes("\ufeff# my own\r\nred car\r\n\r\n  Blue sky  # as seen\nRED  CAR\n \t\nblue sky\nC#\n".encode())
    with caplog.at_level(logging.WARNING):
        bank = load_concepts(file)
    assert bank.concepts == ("red car", "Blue sky", "C#")
    assert bank.banks == ("mine",) * 3
    assert (bank.blank, bank.repeated) == (2, 2)
    assert load_concepts(str(file)) == bank
    assert bank.omissions() == ["2 blank lines were left out.", "2 repeated concepts were left out."]
    assert all(sentence in caplog.text for sentence in bank.omissions())


def test_a_list_may_mix_banks_files_and_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "more.txt").write_text("a zebra\nred\n\n")
    with caplog.at_level(logging.WARNING):
        bank = load_concepts(["a zebra", "colours", str(tmp_path / "more.txt"), "colors"])
    assert (bank.concepts[:2], bank.concepts[-1]) == (("a zebra", "red"), "colors")
    assert (bank.banks[0], bank.banks[1], bank.banks[-1]) == ("own", "colours", "own")
    assert (bank.repeated, bank.blank) == (2, 1)
    assert "the bank is called 'colours'" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "lists no concept"),
        (b"# only\n\n   # comments\n", "lists no concept"),
        (b"red\n...\n", r"line 2: '\.\.\.'"),
        (b'red\n""\n--\n', "line 2: .*line 3: "),
        (b"x" * 201, "at most 200 characters"),
        (b"!\n" * 20, "; and 12 more"),
        (b"caf\xe9\n", "is not a text file in UTF-8"),
    ],
)
def test_files_of_nothing_or_nonsense_are_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.txt.*{words}"):
        load_concepts(tmp_path / "bad.txt")


def test_other_bad_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'colors' is neither a concept bank \(colours, .*did you mean 'colours'\?"):
        load_concepts("colors")
    for source in (tmp_path / "nowhere.txt", ["red", str(tmp_path / "nowhere.txt")]):
        with pytest.raises(FileNotFoundError, match=r"no concept file .*nowhere\.txt"):
            load_concepts(source)
    with pytest.raises(ValueError, match="entry 2: ''"):
        load_concepts(["red", " "])
    with pytest.raises(ValueError, match="no concept in"):
        load_concepts([])


class Words:
    """An encoder that remembers what it was asked, and answers with a row that tells the name's length."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[str, ...], tuple[str, ...]]] = []

    def embed_classes(self, names: list[str], templates: list[str]) -> torch.Tensor:
        self.asked.append((tuple(names), tuple(templates)))
        return torch.tensor([[float(len(name))] for name in names])


def test_every_concept_gets_the_prompt_of_its_bank_and_keeps_its_row() -> None:
    bank = ConceptBank(("red", "a zebra", "blue"), ("colours", "own", "colours"))
    words = Words()
    assert embed_concepts(words, bank)[:, 0].tolist() == [3.0, 7.0, 4.0]
    colours, own = (("red", "blue"), ("an image of something {class}",)), (("a zebra",), ("an image of {class}",))
    assert words.asked == [colours, own]
    words = Words()
    embed_concepts(words, bank, ["{concept}!", "a {concept}"])
    assert words.asked == [(("red", "a zebra", "blue"), ("{class}!", "a {class}"))]


@pytest.mark.parametrize("templates", [[], ["an image"], ["{concept}", "{class}"], "{concept}"])
def test_templates_without_a_place_for_the_concept_are_refused(templates: list[str]) -> None:
    with pytest.raises(ValueError, match=r"expected templates with \{concept\}"):
        load_concepts(["red"]).templates(templates)
