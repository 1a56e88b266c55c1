"""The translator's file: what it says, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from singreg.translator import LinearTranslator, TranslatorInfo, fit_translator, load_translator

INFO = TranslatorInfo(classifier="resnet50", head_hash="abc", vlm="ViT-L-14", vlm_preprocessing="224", images=7)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    translator = LinearTranslator(torch.randn(3, 4), torch.randn(3), INFO)
    translator.save(tmp_path / "t.safetensors")
    loaded = load_translator(tmp_path / "t.safetensors", expected=INFO)
    assert torch.equal(loaded.matrix, translator.matrix)
    assert torch.equal(loaded.offset, translator.offset)
    assert loaded.info == INFO
    assert list(loaded.parameters()) == []


def test_every_difference_is_named(tmp_path: Path) -> None:
    LinearTranslator(torch.randn(3, 4), torch.randn(3), INFO).save(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=r"(?s)head_hash.*'abc'.*'xyz'.*vlm: .*'ViT-B-32'") as caught:
        load_translator(tmp_path / "t.safetensors", expected=replace(INFO, head_hash="xyz", vlm="ViT-B-32", images=9))
    assert "images" not in str(caught.value)


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_translator(tmp_path / "none.safetensors")
    save_file({"matrix": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a translator file"):
        load_translator(tmp_path / "other.safetensors")
    path = tmp_path / "t.safetensors"
    LinearTranslator(torch.randn(3, 4), torch.randn(3), INFO).save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="damaged"):
        load_translator(path)


def test_fit_recovers_a_linear_map_from_a_stream_and_an_empty_one_is_refused() -> None:
    f, matrix = torch.randn(500, 6), torch.randn(4, 6)
    translator = fit_translator([(f[i : i + 33], f[i : i + 33] @ matrix.T + 2) for i in range(0, 500, 33)], info=INFO)
    torch.testing.assert_close(translator(f), f @ matrix.T + 2, atol=1e-3, rtol=1e-3)
    assert translator.info.images == 500
    assert translator.info.validation_r2 > 0.99
    with pytest.raises(ValueError, match="empty"):
        fit_translator([])


def test_wrong_width_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(\.\.\., 6\), got \(2, 5\)"):
        LinearTranslator(torch.ones(3, 6), torch.ones(3))(torch.ones(2, 5))
