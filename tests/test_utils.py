"""Files whole or not at all, hashes that do not hang on the machine, rows and sums over processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from singreg import utils
from tests.processes import run_processes


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    utils.write_text(target, "old")
    with pytest.raises(RuntimeError), utils.atomic_write(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_sweeping_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    with utils.atomic_write(tmp_path / "a.txt") as temporary:
        left = tmp_path / "below" / temporary.name
    left.parent.mkdir()
    others = [tmp_path / "below" / ".keep", tmp_path / "b-writing-abcdefgh"]
    for path in (left, *others):
        path.write_text("")
    folder = tmp_path / ".model-writing-abcdefgh" / "new"
    folder.mkdir(parents=True)
    utils.sweep(tmp_path)
    assert not left.exists()
    assert not folder.parent.exists()
    assert all(path.exists() for path in others)


def test_without_a_home_directory_the_cache_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SINGREG_CACHE")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where the user has no entry and $HOME is unset
    with pytest.raises(ValueError, match="SINGREG_CACHE"):
        utils.cache_folder()


def test_json_is_strict(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    utils.write_json(file, {"a": [np.float32(0.5), float("inf")], "b": torch.tensor([1.0]), 3: Path("x")})
    assert json.loads(file.read_text()) == {"a": [0.5, None], "b": [1.0], "3": "x"}


def test_a_tensors_hash_does_not_hang_on_layout() -> None:
    x = torch.randn(4, 6)
    assert utils.sha256_of_tensor(x) == utils.sha256_of_tensor(x.T.contiguous().T)
    assert utils.sha256_of_tensor(x) != utils.sha256_of_tensor(x.reshape(6, 4))


def _work(rank: int, world: int) -> tuple[dict[str, np.ndarray], list[float]]:
    """Five rows on two processes, or one of three without any."""
    mine = np.arange(rank, 5, world) if rank < 2 else np.zeros(0, dtype=np.int64)
    rows = [{"index": mine, "pair": np.stack([mine, -mine], 1) * 0.5, "flag": mine > 2}] if len(mine) else []
    values = torch.arange(rank + 1.0)
    sums = [utils.all_reduce_sum(values.sum()), utils.all_reduce_mean(values)]
    return utils.gather_rows(rows, sort_by="index"), [float(value) for value in sums]


@pytest.mark.parametrize("world", [2, 3])
def test_rows_and_sums_over_processes(world: int) -> None:
    with pytest.raises(ValueError, match="no process has any row"):
        utils.gather_rows([])
    for rows, sums in run_processes(world, _work):
        wanted = sorted(i for rank in range(min(world, 2)) for i in range(rank, 5, world))
        assert rows["index"].tolist() == wanted
        assert rows["pair"].dtype == np.float64
        np.testing.assert_array_equal(rows["pair"][:, 1], -0.5 * np.array(wanted))
        assert rows["flag"].tolist() == [i > 2 for i in wanted]
        values = [float(i) for rank in range(world) for i in range(rank + 1)]
        assert sums == pytest.approx([sum(values), sum(values) / len(values)])
