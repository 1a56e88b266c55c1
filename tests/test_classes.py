"""Named sets against ImageNet's own tables; names, synonyms and lists; errors that name everything at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from timm.data import ImageNetInfo

from singreg.data.classes import expand_classes, named_sets, resolve_classes

SYNSETS = ImageNetInfo().label_names()


def test_named_sets_are_complete_and_known() -> None:
    for name, count in zip(named_sets(), (100, 16, 10, 10), strict=True):
        subset = resolve_classes(name)
        assert len(subset.keys) == count == len(set(subset.indices or ())) == len(set(subset.names))
        assert [SYNSETS[index] for index in subset.indices or ()] == list(subset.keys)
    assert resolve_classes("imagenette").names[:3] == ("tench", "English springer", "cassette player")
    assert resolve_classes("imagewoof").names[-1] == "dingo"
    assert resolve_classes("imagenet100").keys[0] == "n02869837"
    assert "sports car" in resolve_classes("imagenet16").names


def test_every_imagenet_class_has_its_own_name_that_leads_back_to_it() -> None:
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
    assert subset.keys == ("n02123394", "n01443537")
    assert subset.indices == (283, 1)
    assert resolve_classes(None, ["b", "a"]).keys == ("a", "b")


def test_folders_that_are_not_imagenets() -> None:
    subset = resolve_classes("imagenette", [*expand_classes("imagenette"), "my_things"])
    assert len(subset.keys) == 10
    mixed = resolve_classes(["goldfish", "my things"], ["n01443537", "my_things"])
    assert mixed.keys == ("n01443537", "my_things")
    assert mixed.names == ("goldfish", "my things")
    assert mixed.indices is None


def test_a_list_file_with_comments(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("# mine\ngoldfish\n\nn02123394  # Persian cat\n")
    assert resolve_classes(str(path)).indices == (1, 283)
    assert expand_classes(str(path)) == ("goldfish", "n02123394")
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"classes\.txt. lists no class"):
        resolve_classes(str(path))


def test_missing_classes_are_named_together_with_their_neighbours() -> None:
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
    with pytest.raises(ValueError, match="lists no class"):
        resolve_classes([])
