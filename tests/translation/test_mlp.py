"""The MLP translator: it fits what a linear one cannot, is frozen and exact on disk, and stops where validation is best."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from singreg import mlp as mlp_fitting
from singreg.mlp import KINDS, MLPNetwork, MLPSettings, MLPTranslator, fit_mlp_translator
from singreg.translator import LinearTranslator, TranslatorInfo, fit_translator, load_translator
from tests.processes import run_processes

QUICK = MLPSettings(hidden=32, dropout=0.0, learning_rate=3e-3, batch_size=64, epochs=60, patience=60)
INFO = TranslatorInfo(classifier="resnet50", head_hash="abc", vlm="ViT-L-14", vlm_preprocessing="224")


def curved(count: int = 1200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """z = products and absolute values of f, on a large offset and unequal scales; no linear map follows it."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(count, 4, generator=generator)
    z = torch.stack([f[:, 0] * f[:, 1], f[:, 2].abs(), f[:, 3].square()], dim=1)
    return f * torch.tensor([0.01, 1.0, 100.0, 1.0]) + 50, 7 * z + 3


def r2(translator: nn.Module, f: torch.Tensor, z: torch.Tensor) -> float:
    return float(1 - (translator(f) - z).square().sum() / (z - z.mean(0)).square().sum())


def small(kind: str = "mlp3", seed: int = 0) -> MLPTranslator:
    f, z = curved(60)
    settings = MLPSettings(kind=kind, hidden=8, epochs=2, seed=seed)  # type: ignore[arg-type]
    return fit_mlp_translator(f, z, settings=settings, info=INFO, progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fits_a_curved_map_that_the_linear_translator_cannot(kind: str) -> None:
    f, z = curved()
    fresh = curved(seed=1)
    translator = fit_mlp_translator(f, z, settings=replace(QUICK, kind=kind), progress=False)
    assert r2(fit_translator([(f, z)], standardize=True), *fresh) < 0.1
    assert r2(translator, *fresh) > 0.8
    assert translator.info.validation_r2 > 0.8
    assert (translator.info.kind, translator.info.standardized, translator.info.images) == (kind, True, 960)


@pytest.mark.parametrize(("kind", "layers", "skips"), [("mlp3", 3, 0), ("mlp4", 4, 0), ("residual", 4, 2)])
def test_the_network_is_the_blocks_it_is_named_after(kind: str, layers: int, skips: int) -> None:
    torch.manual_seed(0)
    network = MLPNetwork(5, 2, MLPSettings(kind=kind, hidden=6)).eval()  # type: ignore[arg-type]
    assert sum(isinstance(module, nn.Linear) for module in network.modules()) == layers
    x = torch.randn(3, 5)
    by_hand = network.enter(x)
    for norm, _, _, linear in [*network.inner, network.leave]:
        out = linear(torch.nn.functional.gelu(norm(by_hand)))
        by_hand = by_hand + out if skips and linear.out_features == 6 else out
    torch.testing.assert_close(network(x), by_hand)


def test_it_is_frozen_in_eval_mode_and_passes_exact_gradients_to_features() -> None:
    translator = small("residual")
    assert list(translator.parameters()) == []
    assert not translator.train().training
    assert not any(module.training for module in translator.modules())
    translator.requires_grad_(True)
    f = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert translator(f).dtype == torch.float64
    assert torch.autograd.gradcheck(translator, (f * 20 + 50,))
    assert all(not value.requires_grad for value in translator.buffers())
    torch.testing.assert_close(translator(f.float()).double(), translator(f), atol=1e-3, rtol=1e-4)


def test_the_input_is_standardised_inside() -> None:
    f, z = curved(200)
    f = torch.cat([f, torch.full((200, 1), 3.0)], dim=1)  # a dead feature changes nothing and makes no NaN
    scale = torch.tensor([1e-3, 10.0, 1.0, 5.0, 2.0])
    settings = replace(QUICK, epochs=2)
    plain = fit_mlp_translator(f, z, settings=settings, progress=False)
    scaled = fit_mlp_translator(f * scale, z, settings=settings, progress=False)
    torch.testing.assert_close(scaled(f * scale), plain(f), atol=1e-2, rtol=1e-3)
    moved = f.clone()
    moved[:, 4] += 100
    assert torch.equal(plain(moved), plain(f))


def test_same_seed_same_weights_other_seed_other_weights_and_the_callers_randomness_is_untouched() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = small().state_dict()
    assert torch.equal(torch.rand(1), expected)
    torch.rand(17)
    second, other = small().state_dict(), small(seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_training_stops_after_patience_and_keeps_the_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    f, z = curved(60)
    settings = MLPSettings(hidden=8, epochs=9, patience=3)
    third = fit_mlp_translator(f, z, settings=replace(settings, epochs=3), progress=False)
    errors = iter([5.0, 4.0, 1.0, 3.0, 1.5, 1.0, 0.5, 0.1, 0.1])
    monkeypatch.setattr(mlp_fitting, "_error", lambda *_: next(errors))
    stopped = fit_mlp_translator(f, z, settings=settings, progress=False)
    assert list(errors) == [0.5, 0.1, 0.1]  # six epochs: three after the best
    assert torch.equal(stopped(f), third(f))


def test_noise_is_not_learnt_by_heart_and_the_stored_r2_is_that_of_the_held_out_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    f, z = torch.randn(100, 20, generator=generator), torch.randn(100, 2, generator=generator)
    translator = fit_mlp_translator(f, z, settings=replace(QUICK, hidden=64, learning_rate=1e-2), progress=False)
    held_out = torch.arange(100) % 5 == 0
    assert r2(translator, f[held_out], z[held_out]) == pytest.approx(translator.info.validation_r2, abs=1e-4)
    assert r2(translator, f[~held_out], z[~held_out]) < 0.9
    # The control: where the held-out rows are copies of those fitted on, going on looks good, and the noise is learnt.
    copied = f[~held_out].repeat_interleave(3, 0), z[~held_out].repeat_interleave(3, 0)
    fooled = fit_mlp_translator(*copied, settings=replace(QUICK, hidden=64, learning_rate=1e-2), progress=False)
    assert r2(fooled, f[~held_out], z[~held_out]) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_exact(kind: str, tmp_path: Path) -> None:
    translator = small(kind)
    translator.save(tmp_path / "t.safetensors")
    loaded = load_translator(tmp_path / "t.safetensors", expected=INFO)
    assert isinstance(loaded, MLPTranslator)
    f = curved(30, seed=3)[0]
    assert torch.equal(loaded(f), translator(f))
    assert (loaded.info, loaded.settings) == (translator.info, translator.settings)
    assert list(loaded.parameters()) == []
    loaded.double().save(tmp_path / "again.safetensors")
    assert torch.equal(load_translator(tmp_path / "again.safetensors")(f), translator(f))
    with pytest.raises(ValueError, match=r"(?s)another setting.*head_hash.*'abc'.*'xyz'"):
        load_translator(tmp_path / "t.safetensors", expected=replace(INFO, head_hash="xyz"))


def test_both_kinds_are_opened_and_a_linear_file_stays_linear(tmp_path: Path) -> None:
    LinearTranslator(torch.randn(3, 4), torch.randn(3), INFO).save(tmp_path / "t.safetensors")
    loaded = load_translator(tmp_path / "t.safetensors")
    assert isinstance(loaded, LinearTranslator)
    assert (loaded.info.kind, loaded.feature_dim, loaded.target_dim) == ("linear", 4, 3)


def test_a_file_whose_shapes_do_not_fit_its_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    small().save(path)
    tensors = load_file(path)
    with safe_open(str(path), framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "sha256"}  # whoever forges a file drops its seal

    def refuse(words: str, changes: dict[str, torch.Tensor | None], **settings: object) -> None:
        changed = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
        noted = {**json.loads(metadata["settings"]), **settings}
        save_file(changed, path, metadata={**metadata, "settings": json.dumps(noted)})
        with pytest.raises(ValueError, match=words) as caught:
            load_translator(path)
        assert str(path) in str(caught.value)

    refuse(r"enter\.weight: expected \(9999999, 4\).*\(8, 4\)", {}, hidden=9999999)
    refuse(r"no network\.inner\.1\.0\.weight", {}, kind="mlp4")
    refuse("kind must be one of", {}, kind="rnn")
    refuse("damaged", {}, depth=3)
    refuse(r"no target_mean", {"target_mean": None})
    refuse(r"an unknown network\.more", {"network.more": torch.zeros(2)})
    refuse(r"float32, got \(\) of float64", {"target_scale": torch.ones((), dtype=torch.float64)})


@pytest.mark.parametrize(
    ("f", "z", "words"),
    [
        (torch.ones(9, 4), torch.ones(8, 2), r"\(9, 4\) and \(8, 2\)"),
        (torch.ones(9), torch.ones(9, 2), r"\(9,\)"),
        (torch.ones(2, 4), torch.ones(2, 2), "at least 2 rows to fit"),
        (torch.randn(20, 4), torch.ones(20, 2), "all 20 targets are the same"),
        (torch.where(torch.arange(20) == 7, torch.nan, 1.0)[:, None], torch.randn(20, 2), r"features hold NaN or infinity in rows \[7\]"),
        (torch.randn(20, 4), torch.full((20, 2), torch.inf), r"targets hold NaN or infinity in rows \[0, 1, 2, 3, 4\]"),
    ],
)
def test_bad_rows_are_refused(f: torch.Tensor, z: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit_mlp_translator(f, z, settings=replace(QUICK, epochs=1), progress=False)


def test_bad_settings_and_widths_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"hidden must be.*got 0.*patience.*kind must be one of.*dropout.*learning_rate"):
        MLPSettings(kind="x", hidden=0, patience=0, dropout=1.0, learning_rate=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(\.\.\., 4\), got \(2, 5\)"):
        small()(torch.ones(2, 5))


def test_a_training_that_diverges_stops() -> None:
    f, z = curved(200)
    with pytest.raises(ValueError, match=r"diverged in epoch 1; lower learning_rate"):
        fit_mlp_translator(f, z, settings=replace(QUICK, learning_rate=1e30), progress=False)


def test_memory_mapped_arrays_are_read_in_pieces(tmp_path: Path) -> None:
    """Twice the pictures, the same peak; the fit on the file is the fit on the array."""
    f, z = curved(60)
    peaks = []
    for count in (20_000, 40_000):
        rows = np.lib.format.open_memmap(tmp_path / f"f{count}.npy", mode="w+", dtype=np.float32, shape=(count, 256))
        rows[:] = np.random.default_rng(0).normal(size=(1, 256)) + np.arange(count)[:, None] % 7
        rows.flush()
        read = np.load(tmp_path / f"f{count}.npy", mmap_mode="r")
        tracemalloc.start()
        fit_mlp_translator(read, read[:, :3], settings=MLPSettings(hidden=4, epochs=1, batch_size=512), progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
    assert peaks[1] < 0.5 * 40_000 * 256 * 4  # the control: all of it
    settings = MLPSettings(hidden=8, epochs=2)
    np.save(tmp_path / "f.npy", f.numpy())
    np.save(tmp_path / "z.npy", z.numpy())
    mapped = (np.load(tmp_path / name, mmap_mode="r") for name in ("f.npy", "z.npy"))
    from_file = fit_mlp_translator(*mapped, settings=settings, progress=False)
    assert torch.equal(from_file(f), fit_mlp_translator(f, z, settings=settings, progress=False)(f))


def _fit_in_process(rank: int, world: int) -> list[float]:
    f, z = curved(60)
    settings = MLPSettings(hidden=8, epochs=2, seed=rank)  # another seed, so that only the exchange makes them equal
    return fit_mlp_translator(f, z, settings=settings, progress=False)(f).flatten().tolist()


def test_all_processes_get_the_first_ones_weights() -> None:
    first, second = run_processes(2, _fit_in_process)
    assert first == second
