"""An embedding cache that is interrupted, damaged half-way, or computed by two runs at once."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from singreg.data import cached_embeddings, partial
from singreg.data.partial import stretches
from singreg.utils import sha256_of_file
from tests.data.encoding import Encoder, make_part, one_by_one
from tests.processes import run_processes

ROOT = Path(__file__).parents[2]
CODE = """
import sys, time
from pathlib import Path
from singreg.data import cached_embeddings, partial
from tests.data.encoding import Encoder, make_part
folder, pause, seen = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
partial.COMMIT_SECONDS = 0.0
encoder = Encoder()
fine = encoder.embed_images
def slow(images):
    time.sleep(pause)
    rows = fine(images)
    seen.write_text(str(encoder.seen))
    return rows
encoder.embed_images = slow
cached_embeddings(encoder, make_part(folder / "pictures"), folder / "cache", batch_size=2, progress=False)
"""


class Interrupting(Encoder):
    """Ends the run like Ctrl-C once it has seen `after` pictures."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def embed_images(self, images: Tensor) -> Tensor:
        if self.seen >= self.after:
            raise KeyboardInterrupt
        return super().embed_images(images)


@pytest.fixture(autouse=True)
def _commit_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(partial, "LOCK_SECONDS", 0.0)


def interrupted(folder: Path, after: int) -> Path:
    """A cache folder in which a run was stopped; returns the partial file."""
    with pytest.raises(KeyboardInterrupt):
        cached_embeddings(Interrupting(after), make_part(folder / "pictures"), folder / "cache", batch_size=2, progress=False)
    (file,) = (folder / "cache").glob(".*.partial.npy")
    return file


def finished(folder: Path, encoder: Encoder) -> np.ndarray:
    return cached_embeddings(encoder, make_part(folder / "pictures"), folder / "cache", batch_size=2, progress=False)


def assert_only_the_cache_is_left(folder: Path) -> None:
    assert sorted(path.suffix for path in (folder / "cache").iterdir()) == [".json", ".npy"]


@pytest.mark.parametrize(("after", "left"), [(2, 9), (6, 5), (10, 1)])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture, after: int, left: int) -> None:
    file = interrupted(tmp_path, after)
    encoder = Encoder()
    with caplog.at_level(logging.WARNING):
        rows = finished(tmp_path, encoder)
    assert encoder.seen == left
    assert f"{file}: an interrupted run left {after} of 11 rows finished" in caplog.text
    whole = cached_embeddings(Encoder(), make_part(tmp_path / "pictures"), tmp_path / "other", batch_size=2, progress=False)
    assert np.array_equal(rows, whole)  # to the bit: the batches are the same
    assert_only_the_cache_is_left(tmp_path)


def test_before_the_first_commit_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "COMMIT_SECONDS", 1e9)
    with pytest.raises(KeyboardInterrupt):
        cached_embeddings(Interrupting(6), make_part(tmp_path / "pictures"), tmp_path / "cache", batch_size=2, progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_flipped_byte_in_finished_rows_costs_those_rows_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = interrupted(tmp_path, 6)
    content = bytearray(file.read_bytes())
    content[-11 * 16 + 2 * 16 + 3] ^= 1  # in row 2 of 11, each 4 numbers of 4 bytes
    file.write_bytes(content)
    encoder = Encoder()
    with caplog.at_level(logging.WARNING):
        rows = finished(tmp_path, encoder)
    assert encoder.seen == 5 + 2
    assert f"{file}: 1 of 3 stretches of rows are not what was written" in caplog.text
    assert np.allclose(rows, one_by_one(Encoder(), make_part(tmp_path / "pictures")), rtol=1e-5)


@pytest.mark.parametrize("damage", ["torn", "nonsense", "truncated", "gone"])
def test_what_cannot_be_read_is_computed_anew(tmp_path: Path, damage: str) -> None:
    file = interrupted(tmp_path, 6)
    (journal,) = file.parent.glob("*.jsonl")
    notes = journal.read_text().split()
    if damage == "torn":
        journal.write_text(journal.read_text().rstrip()[:-9])
    elif damage == "nonsense":
        journal.write_text('[]\n{"start": "0", "stop": 9}\n{"start": 3, "stop": 99, "sha256": "x"}\nnull\n')
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-16])
    else:
        file.unlink()
    encoder = Encoder()
    rows = finished(tmp_path, encoder)
    assert encoder.seen == (7 if damage == "torn" else 11), notes
    assert np.allclose(rows, one_by_one(Encoder(), make_part(tmp_path / "pictures")), rtol=1e-5)
    assert_only_the_cache_is_left(tmp_path)


def start(folder: Path, pause: float, name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CODE, str(folder), str(pause), str(folder / name)], cwd=ROOT)


def wait_for(path: Path, process: subprocess.Popen[bytes], pictures: int = 2) -> None:
    """Until the other process says that it has encoded so many."""
    deadline = time.monotonic() + 120
    while not path.exists() or int(path.read_text() or 0) < pictures:
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_run_is_gone_on_with(tmp_path: Path) -> None:
    make_part(tmp_path / "pictures")
    process = start(tmp_path, 0.3, "seen")
    wait_for(tmp_path / "seen", process, 6)  # so two batches are noted for certain
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    encoder = Encoder()
    rows = finished(tmp_path, encoder)
    assert encoder.seen <= 11 - 4
    assert np.allclose(rows, one_by_one(Encoder(), make_part(tmp_path / "pictures")), rtol=1e-5)
    assert_only_the_cache_is_left(tmp_path)


def test_two_runs_at_once_give_one_good_file(tmp_path: Path) -> None:
    make_part(tmp_path / "pictures")
    slow = start(tmp_path, 0.5, "slow")
    wait_for(tmp_path / "slow", slow)
    encoder = Encoder()
    rows = finished(tmp_path, encoder)  # while the other holds the lock
    assert slow.poll() is None
    assert encoder.seen == 11
    assert slow.wait(120) == 0
    expected = one_by_one(Encoder(), make_part(tmp_path / "pictures"))
    (file,) = (tmp_path / "cache").glob("*.npy")
    note = json.loads(file.with_suffix(".json").read_text())
    again = Encoder()
    assert np.allclose(finished(tmp_path, again), expected, rtol=1e-5)
    assert np.allclose(rows, expected, rtol=1e-5)
    assert again.seen == 0
    assert note["bytes"] == file.stat().st_size
    assert_only_the_cache_is_left(tmp_path)


def test_a_second_run_that_waits_long_enough_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "LOCK_SECONDS", 120.0)
    make_part(tmp_path / "pictures")
    slow = start(tmp_path, 0.1, "slow")
    wait_for(tmp_path / "slow", slow)
    encoder = Encoder()
    rows = finished(tmp_path, encoder)
    assert slow.wait(120) == 0
    assert encoder.seen == 0
    assert np.allclose(rows, one_by_one(Encoder(), make_part(tmp_path / "pictures")), rtol=1e-5)
    assert_only_the_cache_is_left(tmp_path)


def _half_then_all(rank: int, world: int, folder: str, *, failing: bool) -> tuple[int, str, list[list[float]]]:
    partial.COMMIT_SECONDS = 0.0
    encoder, rows, failure = Encoder(), np.zeros((0, 4), np.float32), ""
    fine = encoder.embed_images

    def broken(images: Tensor) -> Tensor:
        if rank == 1 and encoder.seen >= 2:
            raise OSError("the device is gone")
        return fine(images)

    if failing:
        encoder.embed_images = broken  # type: ignore[method-assign]
    try:
        part = make_part(Path(folder) / "pictures")
        rows = np.asarray(cached_embeddings(encoder, part, Path(folder) / "cache", batch_size=1, progress=False))
    except (OSError, RuntimeError) as error:
        failure = str(error)
    return encoder.seen, failure, rows.tolist()


def _half(rank: int, world: int, folder: str) -> tuple[int, str, list[list[float]]]:
    return _half_then_all(rank, world, folder, failing=True)


def _all(rank: int, world: int, folder: str) -> tuple[int, str, list[list[float]]]:
    return _half_then_all(rank, world, folder, failing=False)


def test_what_is_missing_is_shared_by_however_many_processes_come_next(tmp_path: Path) -> None:
    expected = one_by_one(Encoder(), make_part(tmp_path / "pictures"))
    first, second = run_processes(2, _half, str(tmp_path))
    assert (first[0], second[0]) == (6, 2)
    assert "encoding failed elsewhere: process 1: OSError: the device is gone" in first[1]
    found = run_processes(3, _all, str(tmp_path))  # rows 8 to 10, which were all the second process's
    assert [seen for seen, _, _ in found] == [1, 1, 1]
    assert all(np.allclose(rows, expected, rtol=1e-5) for _, _, rows in found)
    assert_only_the_cache_is_left(tmp_path)
    for file in (tmp_path / "cache").glob("*.npy"):
        assert json.loads(file.with_suffix(".json").read_text())["sha256"] == sha256_of_file(file)


def test_no_room_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    encoder = Encoder()
    with pytest.raises(OSError, match=r"no room for a cache of 0 MiB: .*\.partial\.npy"):
        finished(tmp_path, encoder)
    assert encoder.seen == 0
    assert list((tmp_path / "cache").iterdir()) == []


def test_stretches() -> None:
    assert stretches([]) == []
    assert stretches([4]) == [(4, 5)]
    assert stretches([0, 1, 2, 7, 8, 10]) == [(0, 3), (7, 9), (10, 11)]
