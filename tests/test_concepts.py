"""Concept banks: what the package brings, users' files and lists, what is left out, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from singreg.data.classes import imagenet_names
from singreg.data.concepts import BANK_TEMPLATES, CONCEPTS_FOLDER, ConceptBank, embed_concepts, load_concepts


def test_the_banks_of_the_package_are_whole() -> None:
    written = [path.stem for path in CONCEPTS_FOLDER.iterdir() if path.suffix == ".txt"]
    assert {*written, "imagenet"} == {*BANK_TEMPLATES}
    assert load_concepts(["imagenet"]).concepts == imagenet_names()
    for name in written:
        bank = load_concepts([name])
        assert set(bank.banks) == {name}
        assert 40 <= len(bank.concepts) <= 90
    assert not load_concepts(written).omissions  # a word has one meaning, and one prompt, in all banks
    assert '"concepts/*.txt"' in (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")


def test_a_list_mixes_banks_files_and_words(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes("\ufeff# my own\r\nred car\r\n\r\n  Blue sky  # as seen\nRED  CAR\n \t\nblue sky\nC#\n".encode())
    bank = load_concepts(["a zebra", "colours", str(file), "A Zebra", "colors"])
    assert (bank.concepts[:2], bank.concepts[-4:]) == (("a zebra", "red"), ("red car", "Blue sky", "C#", "colors"))
    assert (bank.banks[:2], bank.banks[-4:]) == (("own", "colours"), ("mine", "mine", "mine", "own"))
    assert bank.omissions == ("3 repeated concepts were left out.",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# only\n\n   # comments\n", "no concept in .*bad.txt"),
        (b'red\n""\n--\n', "bad.txt line 2: .*bad.txt line 3: "),
        (b"x" * 201, "bad.txt line 1: .*"),
    ],
)
def test_files_of_nothing_or_nonsense_are_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_concepts([str(tmp_path / "bad.txt")])
    with pytest.raises(FileNotFoundError, match=r"no concept file .*nowhere\.txt"):
        load_concepts(["red", str(tmp_path / "nowhere.txt")])


class Words:
    """An encoder that remembers what it was asked, and answers with a row that tells the name's length."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[str, ...], tuple[str, ...]]] = []

    def embed_classes(self, names: list[str], templates: list[str]) -> torch.Tensor:
        self.asked.append((tuple(names), tuple(templates)))
        return torch.tensor([[float(len(name))] for name in names])


def test_every_concept_gets_the_prompt_of_its_bank_and_keeps_its_row() -> None:
    bank, words = ConceptBank(("red", "a zebra", "blue"), ("colours", "own", "colours")), Words()
    assert embed_concepts(words, bank)[:, 0].tolist() == [3.0, 7.0, 4.0]
    assert words.asked[0] == (("red", "blue"), ("an image of something {class}",))
    assert words.asked[1] == (("a zebra",), ("an image of {class}",))
    embed_concepts(words, bank, ["{concept}!", "a {concept}"])
    assert words.asked[2] == (("red", "a zebra", "blue"), ("{class}!", "a {class}"))
