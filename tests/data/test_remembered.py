"""What is remembered of checked pictures and verified files: exact, small, and forgotten when anything changed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from singreg.data import verified
from singreg.data.remembered import Remembered, keys_of
from singreg.utils import sha256_of_file


def some(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    stamps = rng.integers(0, 2**62, (count, 2))
    return keys_of((f"{seed} {place}" for place in range(count)), count), stamps, rng.integers(0, 256, (count, 32), dtype=np.uint8)


def test_what_was_learnt_is_found_by_key_and_stamp_and_replaced_by_what_is_newer() -> None:
    known, (keys, stamps, digests) = Remembered(), some(1000)
    assert (known.find(keys, stamps) == -1).all()
    known.add(keys[:600], stamps[:600], digests[:600])
    known.add(keys[500:], stamps[500:] + 1, digests[500:])
    assert len(known) == 1000
    assert np.array_equal(known.find(keys, stamps) >= 0, np.arange(1000) < 500)
    places = known.find(keys[500:], stamps[500:] + 1)
    assert np.array_equal(known.digests[places], digests[500:])
    assert (known.find(some(50, 1)[0], stamps[:50]) == -1).all()
    assert known.find(keys[:0], stamps[:0]).tolist() == []
    assert sum(column.nbytes for column in (known.keys, known.stamps, known.digests)) == 64 * 1000


def test_it_is_kept_in_a_file_and_a_damaged_one_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known, (keys, stamps, digests) = Remembered(), some(300)
    known.add(keys, stamps, digests)
    file = tmp_path / "known.npz"
    known.write(file)
    again = Remembered.read(file)
    assert np.array_equal(again.digests[again.find(keys, stamps)], digests)
    whole = file.read_bytes()
    np.savez(tmp_path / "other.npz", keys=known.keys, stamps=known.stamps[:-1], digests=known.digests)
    np.savez(tmp_path / "order.npz", keys=known.keys[::-1], stamps=known.stamps, digests=known.digests)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[:-50], b"{damaged", bytes(flipped), *((tmp_path / name).read_bytes() for name in ("other.npz", "order.npz"))):
        file.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(Remembered.read(file)) == 0
        assert f"the picture cache {file} cannot be used" in caplog.text
    assert len(Remembered.read(None)) == len(Remembered.read(tmp_path / "none.npz")) == 0


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    read: list[Path] = []
    monkeypatch.setattr(verified, "sha256_of_file", lambda path: (read.append(path), sha256_of_file(path))[1])
    monkeypatch.setattr(verified, "_whole", set())
    return read


def test_a_file_is_hashed_again_only_when_it_changed(tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.npy"
    file.write_bytes(b"content")
    digest = sha256_of_file(file)
    assert verified.hashes_to(file, digest)
    assert verified.hashes_to(file, digest)
    assert len(hashed) == 2, "it is too young to be trusted: one more change could bear the same time"
    monkeypatch.setattr(verified, "SETTLED_NS", 0)
    assert [verified.hashes_to(file, digest) for _ in range(3)] == [True] * 3
    assert len(hashed) == 3
    assert not verified.hashes_to(file, "0" * 64)
    status = file.stat()
    file.write_bytes(b"CONTENT")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as whoever hides a change would
    assert not verified.hashes_to(file, digest)


def test_what_another_process_verified_is_taken_over(tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "SETTLED_NS", 0)
    file = tmp_path / "rows.npy"
    file.write_bytes(b"content")
    digest = sha256_of_file(file)
    verified.hashes_to(file, digest)
    handed = verified.known_whole()
    monkeypatch.setattr(verified, "_whole", set())
    verified.trust(handed)
    assert verified.hashes_to(file, digest)
    assert len(hashed) == 1
