"""Translators: what they fit, that they are frozen, and what their files say and refuse."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from singreg.mlp import KINDS, MLPNetwork, MLPSettings
from singreg.translator import LinearTranslator, TranslatorInfo, fit_mlp_translator, fit_translator, load_translator
from tests.processes import run_processes

QUICK = MLPSettings(hidden=32, dropout=0.0, learning_rate=3e-3, batch_size=64, epochs=60, patience=60)
INFO = TranslatorInfo(classifier="resnet50", head_hash="abc", vlm="ViT-L-14", vlm_preprocessing="224", images=7)


def curved(count: int = 1200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """z = products and absolute values of f, on a large offset and unequal scales; no linear map follows it."""
    f = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    z = torch.stack([f[:, 0] * f[:, 1], f[:, 2].abs(), f[:, 3].square()], dim=1)
    return f * torch.tensor([0.01, 1.0, 100.0, 1.0]) + 50, 7 * z + 3


def r2(translator: nn.Module, f: Tensor, z: Tensor) -> float:
    return float(1 - (translator(f) - z).square().sum() / (z - z.mean(0)).square().sum())


def fit(f: Tensor, z: Tensor, settings: MLPSettings = QUICK, **options: Any) -> Any:
    return fit_mlp_translator(f.numpy(), z.numpy(), settings=settings, progress=False, **options)


def small(kind: Any = "mlp3", seed: int = 0) -> Any:
    return fit(*curved(60), MLPSettings(kind=kind, hidden=8, epochs=2, seed=seed), info=INFO)


@pytest.mark.parametrize("kind", ["linear", *KINDS])
def test_round_trip_is_exact_and_every_difference_is_named(kind: str, tmp_path: Path) -> None:
    path, f = tmp_path / "t.safetensors", curved(30, seed=3)[0]
    translator = small(kind) if kind != "linear" else LinearTranslator(torch.randn(3, 4), torch.randn(3), INFO)
    translator.save(path)
    loaded = load_translator(path, expected=replace(INFO, images=9, kind="x"))
    assert torch.equal(loaded(f), translator(f))
    assert (type(loaded), loaded.info, loaded.info.kind) == (type(translator), translator.info, kind)
    assert (loaded.feature_dim, loaded.target_dim, list(loaded.parameters())) == (4, 3, [])
    loaded.double().save(path)
    loaded = load_translator(path)
    assert torch.equal(loaded(f), translator(f))
    with pytest.raises(ValueError, match=r"(?s)another setting.*head_hash.*'abc'.*'xyz'.*vlm: .*'ViT-B-32'"):
        load_translator(path, expected=replace(INFO, head_hash="xyz", vlm="ViT-B-32"))
    with pytest.raises(ValueError, match=r"\(\.\.\., 4\), got \(2, 5\)"):
        loaded(torch.ones(2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loaded(f), translator(f))


def test_damaged_and_foreign_files_are_named_and_an_older_seal_is_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(FileNotFoundError, match=r"t\.safetensors"):
        load_translator(path)
    tensors = {"matrix": torch.ones(2, 2), "offset": torch.zeros(2)}
    for metadata in (None, {"format": "other"}, {"format": LinearTranslator.FORMAT, "info": "[1]"}):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"t\.safetensors is damaged or not a translator"):
            load_translator(path)
    save_file(tensors, path, metadata={"format": LinearTranslator.FORMAT, "info": '{"later": 1}', "sha256": "0"})
    assert torch.equal(load_translator(path)(torch.ones(1, 2)), torch.full((1, 2), 2.0))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="damaged"):
        load_translator(path)


def test_the_authors_released_layout_is_read_without_unpickling(tmp_path: Path) -> None:
    path, layer, f = tmp_path / "best.pt", nn.Linear(4, 3), torch.randn(5, 4)
    torch.save(layer.state_dict(), path)
    loaded = load_translator(path, expected=INFO, widths=(4, 3))
    assert torch.equal(loaded(f), layer(f))
    with pytest.raises(ValueError, match=r"best\.pt takes features of 4.*\(5, 3\)"):
        load_translator(path, widths=(5, 3))
    one = {"weight": torch.ones(3, 4)}
    for content in (one, one | {"bias": torch.ones(4)}, {"weight": 1, "bias": 2}, [1.0], Path("code")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"best\.pt is damaged or not a translator file: .{5,130}$"):
            load_translator(path)
    path.write_bytes(b"no file of torch's")
    with pytest.raises(ValueError, match="damaged"):
        load_translator(path)


def test_an_mlp_file_whose_shapes_do_not_fit_its_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    small().save(path)
    tensors = load_file(path)
    with safe_open(str(path), framework="pt") as file:
        metadata = dict(file.metadata())

    def refuse(words: str, changes: dict[str, Tensor | None], **settings: object) -> None:
        changed = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
        noted = json.dumps({**json.loads(metadata["settings"]), **settings})
        save_file(changed, path, metadata={**metadata, "settings": noted})
        with pytest.raises(ValueError, match=rf"(?s)t\.safetensors.*{words}"):
            load_translator(path)

    refuse(r"enter\.weight", {}, hidden=9999999)
    refuse(r"network\.inner\.1\.0\.weight", {}, kind="mlp4")
    refuse("damaged", {}, depth=3)
    refuse("target_mean", {"target_mean": None})
    refuse(r"network\.more", {"network.more": torch.zeros(2)})


def test_fit_recovers_a_linear_map_from_a_stream_and_an_empty_one_is_refused() -> None:
    f, matrix = torch.randn(500, 6), torch.randn(4, 6)
    stream = [(f[i : i + 33], f[i : i + 33] @ matrix.T + 2) for i in range(0, 500, 33)]
    translator = fit_translator(stream, info=INFO)
    torch.testing.assert_close(translator(f), f @ matrix.T + 2, atol=1e-3, rtol=1e-3)
    assert (translator.info.images, translator.info.validation_r2 > 0.99) == (500, True)
    with pytest.raises(ValueError, match="empty"):
        fit_translator([])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fits_a_curved_map_that_the_linear_one_cannot(kind: Any) -> None:
    (f, z), fresh = curved(), curved(seed=1)
    translator = fit(f, z, replace(QUICK, kind=kind))
    assert r2(fit_translator([(f, z)]), *fresh) < 0.1
    assert min(r2(translator, *fresh), translator.info.validation_r2) > 0.8
    assert (translator.info.kind, translator.info.images) == (kind, 960)


@pytest.mark.parametrize(("kind", "layers", "skips"), [("mlp3", 3, 0), ("mlp4", 4, 0), ("residual", 4, 2)])
def test_the_network_is_the_blocks_it_is_named_after(kind: Any, layers: int, skips: int) -> None:
    torch.manual_seed(0)
    network = MLPNetwork(5, 2, MLPSettings(kind=kind, hidden=6)).eval()
    assert sum(isinstance(module, nn.Linear) for module in network.modules()) == layers
    x = torch.randn(3, 5)
    by_hand = network.enter(x)
    for norm, _, _, linear in [*network.inner, network.leave]:
        out = linear(torch.nn.functional.gelu(norm(by_hand)))
        by_hand = by_hand + out if skips and linear.out_features == 6 else out
    torch.testing.assert_close(network(x), by_hand)


def test_an_mlp_is_frozen_in_eval_mode_and_passes_exact_gradients_to_features() -> None:
    translator = small("residual")
    assert not any(module.training for module in translator.train().modules())
    translator.requires_grad_(True)
    f = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    own = translator(f)
    assert own.dtype == torch.float64
    assert torch.autograd.gradcheck(translator.double(), (f * 20 + 50,))
    assert all(not value.requires_grad for value in translator.buffers())
    torch.testing.assert_close(own, translator(f), atol=1e-3, rtol=1e-4)


def test_a_seed_fixes_the_weights_and_the_callers_randomness_is_untouched() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = small().state_dict()
    assert torch.equal(torch.rand(1), expected)
    second, other = small().state_dict(), small(seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("f", "z", "words"),
    [
        (torch.ones(9, 4), torch.ones(8, 2), r"\(9, 4\) and \(8, 2\)"),
        (torch.ones(9), torch.ones(9, 2), r"\(9,\)"),
        (torch.ones(2, 4), torch.ones(2, 2), "2 rows to fit"),
        (torch.randn(20, 4), torch.ones(20, 2), "all 20 targets are the same"),
        (torch.where(torch.arange(20) == 7, torch.nan, 1.0)[:, None], torch.randn(20, 2), r"features hold.*\[7\]"),
        (torch.randn(20, 4), torch.full((20, 2), torch.inf), r"targets hold NaN or infinity in rows \[1\]"),
    ],
)
def test_bad_rows_are_refused(f: Tensor, z: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(f, z, replace(QUICK, epochs=1))


def test_memory_mapped_arrays_are_read_in_pieces(tmp_path: Path) -> None:
    """The peak is far below all of the rows; the fit on the file is the fit on the array."""
    f, z = curved(60)
    for name, values in (("large", np.arange(40_000 * 256, dtype=np.float32).reshape(-1, 256) % 7), ("small", f)):
        np.save(tmp_path / f"{name}.npy", values)
    large, small_file = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("large", "small"))
    tracemalloc.start()
    fit_mlp_translator(large, large[:, :3], settings=MLPSettings(hidden=4, epochs=1, batch_size=512), progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5 * large.nbytes
    settings = MLPSettings(hidden=8, epochs=2)
    mapped = fit_mlp_translator(small_file, z.numpy(), settings=settings, progress=False)
    assert torch.equal(mapped(f), small()(f))


def _fit_in_process(rank: int, world: int) -> list[float]:
    return small(seed=rank)(curved(60)[0]).flatten().tolist()  # another seed: only the exchange makes them equal


def test_all_processes_get_the_first_ones_weights() -> None:
    first, second = run_processes(2, _fit_in_process)
    assert first == second
