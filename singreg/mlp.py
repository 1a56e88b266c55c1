"""Non-linear translators (METHOD section 2)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from singreg.old_seals import seal_of_tensors
from singreg.translator import Translator, TranslatorInfo
from singreg.utils import atomic_write, is_distributed
from singreg.utils import progress as with_progress

FORMAT = "singreg-mlp-translator-1"
KINDS = ("mlp3", "mlp4", "residual")
_SCALES = ("feature_mean", "feature_scale", "target_mean", "target_scale")


@dataclass(frozen=True)
class MLPSettings:
    """The network and how it is trained; stored with the translator.

    Learning rate, weight decay (AdamW) and the blocks are the paper's; it names no width, dropout or batch size: those are ours.

    Args:
        kind: mlp3 (three linear layers), mlp4 (four), or residual (an entry layer, two residual blocks, an exit block).
        hidden: width of the hidden layers. dropout: within each block, in [0, 1).
        epochs: at most so many passes; training stops `patience` epochs after the best validation error, whose weights are kept.
        seed: of the weights, the order of the pictures and the dropout.

    Raises:
        ValueError: all that is wrong with the values.
    """

    kind: Literal["mlp3", "mlp4", "residual"] = "mlp3"
    hidden: int = 1024
    dropout: float = 0.1
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    batch_size: int = 128
    epochs: int = 100
    patience: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise one ValueError that names everything wrong with the values (no shapes)."""
        whole = {name: getattr(self, name) for name in ("hidden", "batch_size", "epochs", "patience")}
        problems = [f"{name} must be a whole number of at least 1, got {v!r}" for name, v in whole.items() if not _at_least_1(v)]
        if self.kind not in KINDS:
            problems.append(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be in [0, 1), got {self.dropout}")
        if not (self.learning_rate > 0 and self.weight_decay >= 0):
            problems.append(f"learning_rate must be above 0 and weight_decay at least 0, got {self.learning_rate}, {self.weight_decay}")
        if problems:
            raise ValueError("mlp translator: " + "; ".join(problems))


def _at_least_1(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _block(width: int, out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, out))


class MLPNetwork(nn.Module):
    """The trainable network alone, on standardised values. Shapes: (..., m) to (..., n)."""

    def __init__(self, feature_dim: int, target_dim: int, settings: MLPSettings) -> None:
        super().__init__()
        hidden, inner = settings.hidden, 1 if settings.kind == "mlp3" else 2
        self.residual = settings.kind == "residual"
        self.enter = nn.Linear(feature_dim, hidden)
        self.inner = nn.ModuleList(_block(hidden, hidden, settings.dropout) for _ in range(inner))
        self.leave = _block(hidden, target_dim, settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., m) to (..., n)."""
        x = self.enter(x)
        for block in self.inner:
            x = x + block(x) if self.residual else block(x)
        y: Tensor = self.leave(x)
        return y


class MLPTranslator(Translator):
    """T(f) = μ_z + s · net((f − μ_f) / σ_f): a frozen MLP that standardises its input itself (METHOD section 2).

    Everything in it is a buffer, as in `LinearTranslator`: nobody trains it by accident. It is always in eval mode, computes in
    the features' precision (at least float32), and lets gradients through to the features. Made by `fit_mlp_translator`.

    Shapes: forward (..., m) to (..., n). `state` has feature_mean and feature_scale (m,), target_mean (n,), target_scale ()
    and the network's weights as "network.NAME".

    Raises:
        ValueError: a tensor of `state` is missing, unknown, or of another shape than the settings ask for.

    Example:
        >>> from singreg.mlp import fit_mlp_translator
        >>> f = torch.randn(64, 3); settings = MLPSettings(hidden=8, epochs=2)
        >>> T = fit_mlp_translator(f, f[:, :2] ** 2, settings=settings, progress=False)
        >>> T(f).shape, len(list(T.parameters())), T.info.kind
        (torch.Size([64, 2]), 0, 'mlp3')
    """

    feature_mean: Tensor
    feature_scale: Tensor
    target_mean: Tensor
    target_scale: Tensor

    def __init__(self, settings: MLPSettings, state: Mapping[str, Tensor], info: TranslatorInfo | None = None) -> None:
        super().__init__()
        missing = [name for name in _SCALES if name not in state]
        if missing:
            raise ValueError(f"the state of an MLP translator has no {', '.join(missing)}; it has {', '.join(state) or 'nothing'}")
        m, n = state["feature_mean"].numel(), state["target_mean"].numel()
        with torch.device("meta"):
            self.network = MLPNetwork(m, n, settings)
            for name, shape in zip(_SCALES, ((m,), (m,), (n,), ()), strict=True):
                self.register_buffer(name, torch.empty(shape))
        for module in self.network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
        _check_state(self.state_dict(), state)
        self.load_state_dict({name: value.detach().clone() for name, value in state.items()}, assign=True)
        self.settings, self.info = settings, info or TranslatorInfo(kind=settings.kind)
        self.train(False)

    @property
    def feature_dim(self) -> int:
        """m, the width of the features it takes."""
        return self.feature_mean.shape[0]

    @property
    def target_dim(self) -> int:
        """n, the width of the vision-language model's space."""
        return self.target_mean.shape[0]

    def train(self, mode: bool = True) -> MLPTranslator:
        """Stay in eval mode whatever is asked: a fixed measuring instrument (no shapes)."""
        return super().train(False)

    def forward(self, features: Tensor) -> Tensor:
        """Translated features in the dtype of `features`. Shapes: (..., m) to (..., n)."""
        self.check_width(features)
        f = features.to(torch.promote_types(features.dtype, torch.float32))
        weights = {name: value.to(f) for name, value in self.network.named_buffers()}
        mean, scale, target_mean, target_scale = (getattr(self, name).to(f) for name in _SCALES)
        y: Tensor = torch.func.functional_call(self.network, weights, ((f - mean) * scale,))
        translated: Tensor = target_mean + target_scale * y
        return translated.to(features.dtype)

    def save(self, path: str | Path) -> None:
        """Write all tensors (float32), the settings and the info to a safetensors file at the path, atomically."""
        tensors = {name: value.float().cpu().contiguous() for name, value in self.state_dict().items()}
        metadata = {"format": FORMAT, "settings": json.dumps(asdict(self.settings)), "info": json.dumps(asdict(self.info))}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=seal_of_tensors(tensors, metadata))


def _check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    problems = [f"no {name}" for name in expected if name not in state]
    problems += [f"an unknown {name}" for name in state if name not in expected]
    problems += [
        f"{name}: expected {tuple(expected[name].shape)} of float32, got {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
        for name, value in state.items()
        if name in expected and (value.shape != expected[name].shape or value.dtype != torch.float32)
    ]
    if problems:
        raise ValueError(f"the state does not fit the MLP translator's settings: {'; '.join(problems)}")


Array = np.ndarray | Tensor
CHUNK = 4096


def fit_mlp_translator(
    features: Array,
    targets: Array,
    *,
    settings: MLPSettings | None = None,
    validation_every: int = 5,
    normalize_targets: bool = False,
    info: TranslatorInfo | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> MLPTranslator:
    """Fit T by mean squared error on rows (f, z); every fifth row decides when to stop and takes no other part.

    Memory does not grow with N when the arrays are memory-mapped, as `cached_features` and `cached_embeddings` give them.
    The same seed gives the same weights on a CPU. In a process group every process passes the same arrays; the first one's
    weights go to all.

    Shapes: features (N, m), targets (N, n).

    Raises:
        ValueError: other shapes, too few rows, values that are not finite (the first rows are named), or a training that diverges.

    Example:
        >>> f = torch.randn(200, 4); settings = MLPSettings(hidden=16, epochs=3)
        >>> fit_mlp_translator(f, f.abs(), settings=settings, progress=False)(f).shape
        torch.Size([200, 4])
    """
    settings = settings or MLPSettings()
    data = _Data.checked(features, targets, validation_every, normalize_targets, torch.device(device))
    with torch.random.fork_rng(devices=[data.device] if data.device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        network, error = _train(data, settings, progress)
    state = {**data.scales(), **{f"network.{name}": value for name, value in network.items()}}
    if is_distributed():
        for value in state.values():
            torch.distributed.broadcast(value, src=0)
    spread = data.held_out_spread()
    described = replace(
        info or TranslatorInfo(), kind=settings.kind, images=len(data.fit), ridge=0.0, standardized=True,
        normalized_targets=normalize_targets, validation_r2=1 - error / spread if spread > 0 else None,
    )  # fmt: skip
    return MLPTranslator(settings, state, described).to(data.device)


def _train(data: _Data, settings: MLPSettings, progress: bool) -> tuple[dict[str, Tensor], float]:
    """The best epoch's weights and validation error (mean squared, in standardised units)."""
    network = MLPNetwork(data.features.shape[1], data.targets.shape[1], settings).to(data.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best, since = float("inf"), 0
    kept: dict[str, Tensor] = {}
    for epoch in with_progress(range(settings.epochs), f"fitting the {settings.kind} translator", enabled=progress):
        network.train()
        order = torch.randperm(len(data.fit)).numpy()
        for rows in np.split(data.fit[order], range(settings.batch_size, len(order), settings.batch_size)):
            f, z = data.batch(rows)
            optimizer.zero_grad()
            F.mse_loss(network(f), z).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        error = _error(network, data)
        if not np.isfinite(error):
            raise ValueError(f"the training of the {settings.kind} translator diverged in epoch {epoch + 1}; lower learning_rate")
        since += 1
        if error < best:
            best, since = error, 0
            kept = {name: value.detach().clone() for name, value in network.state_dict().items()}
        if since >= settings.patience:
            break
    return kept, best


@torch.no_grad()
def _error(network: MLPNetwork, data: _Data) -> float:
    network.eval()
    total = 0.0
    for rows in np.split(data.held_out, range(CHUNK, len(data.held_out), CHUNK)):
        f, z = data.batch(rows)
        total += float((network(f) - z).double().square().sum())
    return total / (len(data.held_out) * data.targets.shape[1])


def _read(array: Array, rows: np.ndarray) -> Tensor:
    values = torch.from_numpy(np.array(array[rows])) if isinstance(array, np.ndarray) else array[torch.from_numpy(rows)]
    return values.detach().float().cpu()


@dataclass(frozen=True)
class _Data:
    """features (N, m), targets (N, n); row numbers to fit on and to hold out; means and scales of the rows fitted on."""

    features: Array
    targets: Array
    fit: np.ndarray
    held_out: np.ndarray
    normalize: bool
    device: torch.device
    moments: tuple[Tensor, Tensor, Tensor, Tensor]

    @classmethod
    def checked(cls, features: Array, targets: Array, every: int, normalize: bool, device: torch.device) -> _Data:
        if features.ndim != 2 or targets.ndim != 2 or len(features) != len(targets):
            raise ValueError(f"expected features (N, m) and targets (N, n), got {tuple(features.shape)} and {tuple(targets.shape)}")
        rows = np.arange(len(features))
        held_out = rows % every == 0
        if every < 2 or held_out.sum() < 1 or (~held_out).sum() < 2:
            raise ValueError(
                f"an MLP translator needs at least 2 rows to fit and 1 to hold out, got {len(rows)} rows with every {every}th held out"
            )
        empty = (torch.zeros(0),) * 4
        bare = cls(features, targets, rows[~held_out], rows[held_out], normalize, device, empty)
        bare.refuse_non_finite()
        mean, variance = bare.moments_of(0)
        target_mean, target_variance = bare.moments_of(1)
        # A constant feature says nothing: scale 0, as in the ridge fit.
        alive = variance > 1e-11 * (variance + mean.square())
        scale = torch.where(alive, variance.clamp_min(torch.finfo(variance.dtype).tiny).rsqrt(), torch.zeros_like(variance))
        # One scale for all of z, so that the loss stays the paper's squared distance up to a factor.
        spread = target_variance.mean().sqrt()
        if not spread > 0:
            raise ValueError(f"all {len(rows)} targets are the same, so there is nothing to fit")
        moments = tuple(value.float().to(device) for value in (mean, scale, target_mean, spread))
        return replace(bare, moments=moments)  # type: ignore[arg-type]

    def raw(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """(f (B, m), z (B, n)) float32 on the CPU; sorted rows read a memory-mapped file in its order."""
        f, z = _read(self.features, rows), _read(self.targets, rows)
        return f, F.normalize(z, dim=-1) if self.normalize else z

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Standardised (f (B, m), z (B, n)) on the device."""
        f, z = (value.to(self.device) for value in self.raw(np.sort(rows)))
        mean, scale, target_mean, spread = self.moments
        return (f - mean) * scale, (z - target_mean) / spread

    def chunks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, tuple[Tensor, Tensor]]]:
        for chunk in np.split(rows, range(CHUNK, len(rows), CHUNK)):
            yield chunk, self.raw(chunk)

    def refuse_non_finite(self) -> None:
        for rows, pair in self.chunks(np.arange(len(self.features))):
            for name, values in zip(("features", "targets"), pair, strict=True):
                bad = rows[~torch.isfinite(values).all(1).numpy()]
                if len(bad):
                    raise ValueError(f"{name} hold NaN or infinity in rows {bad[:5].tolist()}; one such row would spoil the whole fit")

    def moments_of(self, which: int) -> tuple[Tensor, Tensor]:
        """Mean and variance over the rows fitted on, float64, about the first row (so that no large mean is squared)."""
        first = self.raw(self.fit[:1])[which][0].double()
        total, square = torch.zeros_like(first), torch.zeros_like(first)
        for _, pair in self.chunks(self.fit):
            shifted = pair[which].double() - first
            total += shifted.sum(0)
            square += shifted.square().sum(0)
        mean = total / len(self.fit)
        return first + mean, (square / len(self.fit) - mean.square()).clamp_min(0)

    def scales(self) -> dict[str, Tensor]:
        return dict(zip(("feature_mean", "feature_scale", "target_mean", "target_scale"), self.moments, strict=True))

    def held_out_spread(self) -> float:
        """Mean squared distance of the held-out targets from their mean, in standardised units: the error of a constant."""
        _, _, target_mean, spread = (value.double().cpu() for value in self.moments)
        sums, square = torch.zeros_like(target_mean), 0.0
        for _, (_, z) in self.chunks(self.held_out):
            standard = (z.double().cpu() - target_mean) / spread
            sums += standard.sum(0)
            square += float(standard.square().sum())
        count = len(self.held_out)
        return (square / count - float((sums / count).square().sum())) / len(target_mean)
