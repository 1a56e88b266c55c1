"""Fitting an MLP translator on arrays that need not fit into memory: AdamW, early stopping, best weights kept (METHOD section 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from singreg.distributed import is_distributed
from singreg.progress import progress as with_progress
from singreg.translation.base import TranslatorInfo
from singreg.translation.mlp import MLPNetwork, MLPSettings, MLPTranslator

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
