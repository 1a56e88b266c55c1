"""Classes against ImageNet's own tables, by names, synonyms and lists; concepts of banks, users' files and lists."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from timm.data import ImageNetInfo

from singreg.analysis.levels import BANK_TEMPLATES, CONCEPTS_FOLDER, ConceptBank, embed_concepts, load_concepts
from singreg.classes import NAMED_SETS, expand_classes, imagenet_names, read_list, resolve_classes

SYNSETS = ImageNetInfo().label_names()


def test_named_sets_are_complete_and_known() -> None:
    for name, count in zip(NAMED_SETS, (100, 16, 10, 10), strict=True):
        subset = resolve_classes(name)
        assert len(subset.keys) == count == len(set(subset.indices or ())) == len(set(subset.names))
        assert [SYNSETS[index] for index in subset.indices or ()] == list(subset.keys)
    assert resolve_classes("imagenette").names[:3] == ("tench", "English springer", "cassette player")
    assert "sports car" in resolve_classes("imagenet16").names


def test_every_imagenet_class_has_a_name_that_leads_back() -> None:
    subset = resolve_classes(None)
    assert len(set(subset.names)) == 1000
    assert resolve_classes(list(subset.names)).indices == tuple(range(1000))


@pytest.mark.parametrize("entry", ["Goldfish", "n01443537", "Carassius_auratus", "goldfish, Carassius auratus"])
def test_any_way_to_name_a_class(entry: str) -> None:
    assert resolve_classes([entry]).indices == (1,)
    assert resolve_classes([entry], ["n01443537", "n02123394"]).keys == ("n01443537",)
    assert resolve_classes([entry], ["gold-fish", "Goldfish"]).keys == ("Goldfish",)


def test_the_order_of_the_list_is_the_label_order() -> None:
    subset = resolve_classes(["Persian cat", "goldfish"], ["n01443537", "n02123394"])
    assert (subset.keys, subset.indices) == (("n02123394", "n01443537"), (283, 1))
    assert resolve_classes(None, ["b", "a"]).keys == ("a", "b")


def test_folders_that_are_not_imagenets() -> None:
    subset = resolve_classes("imagenette", [*expand_classes("imagenette"), "my_things"])
    assert len(subset.keys) == 10
    mixed = resolve_classes(["goldfish", "my things"], ["n01443537", "my_things"])
    assert (mixed.keys, mixed.names) == (("n01443537", "my_things"), ("goldfish", "my things"))
    assert mixed.indices is None


def test_a_list_file_with_comments(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeff# mine\r\ngoldfish\r\n\r\n n02123394\r\n".encode())
    assert resolve_classes(str(path)).indices == (1, 283)
    assert expand_classes(str(path)) == ("goldfish", "n02123394")
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"classes\.txt. lists no class"):
        resolve_classes(str(path))


def test_missing_classes_are_named_with_their_neighbours() -> None:
    with pytest.raises(ValueError, match=r"2 of the classes") as caught:
        resolve_classes(["goldfsh", "lion", "sportz car"])
    assert "'goldfsh' (near: goldfish" in str(caught.value)
    assert "'sportz car' (near: sport car, sports car" in str(caught.value)
    assert "'lion'" not in str(caught.value)
    with pytest.raises(ValueError, match=r"'imagenet_16'.*named sets are imagenet100, imagenet16"):
        resolve_classes("imagenet_16")


def test_names_of_two_classes_and_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'crane' \(n02012849, n03126707\)"):
        resolve_classes(["crane"])
    assert resolve_classes(["crane"], ["n03126707", "n02123394"]).names == ("construction crane",)
    with pytest.raises(ValueError, match=r"listed twice.*Carassius auratus, goldfish"):
        resolve_classes(["goldfish", "lion", "Carassius auratus"])


def test_the_banks_of_the_package_are_whole() -> None:
    written = [path.stem for path in CONCEPTS_FOLDER.iterdir() if path.suffix == ".txt"]
    assert {*written, "imagenet"} == {*BANK_TEMPLATES}
    assert load_concepts(["imagenet"]).concepts == imagenet_names()
    for name in written:
        bank = load_concepts([name])
        assert set(bank.banks) == {name}
        assert 40 <= len(bank.concepts) <= 90
    lines = [concept for name in written for concept in read_list(CONCEPTS_FOLDER / f"{name}.txt")]
    assert load_concepts(written).concepts == tuple(lines)  # a word has one meaning, and one prompt, in all banks
    assert '"concepts/*.txt"' in (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")


def test_a_list_mixes_banks_files_and_words(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes("\ufeff# my own\r\nred car\r\n\r\n  Blue sky\nRED  CAR\n \t\nblue sky\nC#\n".encode())
    bank = load_concepts(["a zebra", "colours", str(file), "A Zebra", "colors"])
    assert (bank.concepts[:2], bank.concepts[-4:]) == (("a zebra", "red"), ("red car", "Blue sky", "C#", "colors"))
    assert (bank.banks[:2], bank.banks[-4:]) == (("own", "colours"), ("mine", "mine", "mine", "own"))
    assert len(bank.concepts) == 5 + len(load_concepts(["colours"]).concepts)  # of eight, three are repeated


def test_files_of_nothing_or_nonsense_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.txt"
    for text, words in (
        ("# only\n\n   # comments\n", "no concept in"),
        ('red\n""\n--\n', "bad: .*bad: "),
        ("x" * 201, "bad: "),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            load_concepts([str(file)])
    with pytest.raises(FileNotFoundError, match=r"no concept file .*nowhere\.txt"):
        load_concepts(["red", str(tmp_path / "nowhere.txt")])


def test_every_concept_gets_its_banks_prompt_and_keeps_its_row() -> None:
    bank, words = ConceptBank(("red", "a zebra", "blue"), ("colours", "own", "colours")), Mock()
    words.embed_classes.side_effect = lambda names, _: torch.tensor([[float(len(name))] for name in names])
    assert embed_concepts(words, bank)[:, 0].tolist() == [3.0, 7.0, 4.0]
    embed_concepts(words, bank, ["{concept}!", "a {concept}"])
    asked = [tuple(map(list, call.args)) for call in words.embed_classes.call_args_list]
    assert asked[0] == (["red", "blue"], ["an image of something {class}"])
    assert asked[1] == (["a zebra"], ["an image of {class}"])
    assert asked[2] == (["red", "a zebra", "blue"], ["{class}!", "a {class}"])
