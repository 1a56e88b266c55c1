"""Sealed files: they come back as they were, any change to them or to what they answer for is named, older ones still open."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from singreg.old_seals import (
    CHECKSUMS,
    DamagedFileError,
    check_folder,
    read_rows,
    read_sealed,
    read_sealed_text,
    seal_folder,
    write_sealed,
    write_sealed_text,
)
from singreg.utils import atomic_write, sweep

VALUE = {"AS": 12.5, "names": ["ç", "b"], "none": None, "inner": {"z": 1, "a": [0.1, 1e-300]}}


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    (tmp_path / "rows.bin").write_bytes(b"rows")
    write_sealed(tmp_path / "a.json", VALUE, ["rows.bin"])
    return tmp_path / "a.json"


def test_a_mapping_comes_back_as_it_was(sealed: Path) -> None:
    assert read_sealed(sealed) == VALUE


def test_every_single_bit_counts(sealed: Path) -> None:
    """Only what JSON does not mean by anything, white space, may change without a word."""
    whole = sealed.read_bytes()
    outcomes: list[object] = []
    for place in range(len(whole)):
        for bit in (0, 3, 6):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            sealed.write_bytes(changed)
            try:
                found = read_sealed(sealed)
            except DamagedFileError as error:
                outcomes.append(str(sealed) in str(error))
            else:
                outcomes.append({key: found[key] for key in VALUE} == VALUE)
    assert outcomes == [True] * 3 * len(whole)


@pytest.mark.parametrize("length", [0, 1, 40, -3])
def test_a_cut_file_is_named(length: int, sealed: Path) -> None:
    sealed.write_bytes(sealed.read_bytes()[:length])
    with pytest.raises(DamagedFileError, match=r"a\.json is damaged"):
        read_sealed(sealed)


def test_what_it_answers_for_is_named(sealed: Path) -> None:
    (sealed.parent / "rows.bin").write_bytes(b"rowt")
    with pytest.raises(DamagedFileError, match=r"rows\.bin is damaged: its content is not what was written with a\.json"):
        read_sealed(sealed)
    (sealed.parent / "rows.bin").unlink()
    with pytest.raises(DamagedFileError, match=r"rows\.bin is missing"):
        read_sealed(sealed)


def test_a_file_of_an_earlier_version_opens(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(VALUE))
    assert read_sealed(tmp_path / "old.json") == VALUE
    check_folder(tmp_path)


def test_a_folder_names_what_changed(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    seal_folder(tmp_path)
    check_folder(tmp_path)
    (tmp_path / "model.safetensors").write_text("another")
    with pytest.raises(DamagedFileError, match=r"model\.safetensors is damaged"):
        check_folder(tmp_path)
    (tmp_path / CHECKSUMS).write_text("{")
    with pytest.raises(DamagedFileError, match=r"checksums\.json is damaged"):
        check_folder(tmp_path)


def test_a_text_with_a_seal(tmp_path: Path) -> None:
    file, text = tmp_path / "config.yaml", "seed: 1\nname: ü\n"
    write_sealed_text(file, text)
    assert read_sealed_text(file) == text
    whole = file.read_bytes()
    for changed in (whole.replace(b"seed: 1", b"seed: 3"), whole[:-2], whole[:40], whole.replace(b"ows: ", b"ows; ", 1)):
        file.write_bytes(changed)
        with pytest.raises(DamagedFileError, match=r"config\.yaml was changed or damaged"):
            read_sealed_text(file)
    file.write_bytes(whole.partition(b"\n")[2])
    assert read_sealed_text(file) == text


def test_rows_come_back_and_cut_ones_are_named(tmp_path: Path) -> None:
    rows = {"AS/auditor": np.array([1.5, np.nan]), "image": np.array(["a.png", "ç"]), "none": np.zeros((0, 3)), "f": np.ones((2, 3)).T}
    np.savez(tmp_path / "rows.npz", **rows)
    found = read_rows(tmp_path / "rows.npz")
    assert found.keys() == rows.keys()
    for name, column in rows.items():
        np.testing.assert_array_equal(found[name], column)
    (tmp_path / "rows.npz").write_bytes((tmp_path / "rows.npz").read_bytes()[:-30])
    with pytest.raises(DamagedFileError, match=r"rows\.npz is damaged"):
        read_rows(tmp_path / "rows.npz")


def test_sweeping_removes_what_a_killed_writer_left_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in (".my-settings.json", ".hidden", "a.txt", ".a-writing-short.txt")]
    for path in kept:
        path.write_text("mine")
    with atomic_write(tmp_path / "plots" / "a.png") as temporary:
        temporary.write_text("half")
        left = temporary.with_name(temporary.name)
        copy = left.read_text()
    left.write_text(copy)  # as SIGKILL would have left it
    sweep(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([*kept, tmp_path / "plots" / "a.png"])
