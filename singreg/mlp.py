"""Non-linear translators: the networks of the paper and their training on arrays (METHOD section 2)."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from singreg.utils import is_distributed, progress

MLPKind = Literal["mlp3", "mlp4", "residual"]
KINDS: tuple[MLPKind, ...] = get_args(MLPKind)
HELD_OUT_EVERY = 5  # every fifth row decides when to stop and takes no other part
CHUNK = 4096  # rows read at once
DEAD_FEATURE = 1e-11  # of the raw second moment: what the rounding of float64 sums leaves of a constant


@dataclass(frozen=True)
class MLPSettings:
    """The network and how it is trained; stored with the translator."""

    kind: MLPKind = "mlp3"  # three linear layers; mlp4: four; residual: entry layer, two residual blocks, exit block
    hidden: int = 1024
    dropout: float = 0.1
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    batch_size: int = 128
    epochs: int = 100
    patience: int = 8  # epochs after the best validation error, whose weights are kept
    seed: int = 0  # of the weights, the order of the images and the dropout

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the kind of an MLP translator must be one of {', '.join(KINDS)}, got {self.kind!r}")


class MLPNetwork(nn.Module):
    """The network alone, on standardised values, of LayerNorm-GELU-Dropout-Linear blocks."""

    def __init__(self, feature_dim: int, target_dim: int, settings: MLPSettings) -> None:
        super().__init__()

        def block(out: int) -> nn.Sequential:
            width, dropout = settings.hidden, settings.dropout
            return nn.Sequential(nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, out))

        self.residual = settings.kind == "residual"
        self.enter = nn.Linear(feature_dim, settings.hidden)
        self.inner = nn.ModuleList(block(settings.hidden) for _ in range(1 if settings.kind == "mlp3" else 2))
        self.leave = block(target_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Translate standardised features. Shape: (..., m) to (..., n)."""
        x = self.enter(x)
        for block in self.inner:
            x = x + block(x) if self.residual else block(x)
        return self.leave(x)


def train_mlp(
    features: np.ndarray, targets: np.ndarray, settings: MLPSettings, device: torch.device, shown: bool
) -> tuple[dict[str, Tensor], int, float | None]:
    """Return the state of an `MLPTranslator`, the rows fitted on, and R² on the held-out rows (None if constant)."""
    rows = _Rows(features, targets, device)
    with torch.random.fork_rng(devices=[rows.device] if rows.device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        network, error = _train(rows, settings, shown)
    state = {**rows.scales, **{f"network.{name}": value for name, value in network.items()}}
    for value in state.values() if is_distributed() else ():  # work that all do alike may round differently
        torch.distributed.broadcast(value, src=0)
    spread = float(rows.moments(1, rows.held_out)[1].mean() / rows.scales["target_scale"].double().cpu().square())
    return state, len(rows.fitted), 1 - error / spread if spread > 0 else None


def _train(rows: "_Rows", settings: MLPSettings, shown: bool) -> tuple[dict[str, Tensor], float]:
    """The best epoch's weights and validation error (mean squared, in standardised units)."""
    network = MLPNetwork(rows.arrays[0].shape[1], rows.arrays[1].shape[1], settings).to(rows.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best, since = float("inf"), 0
    kept: dict[str, Tensor] = {}
    for epoch in progress(range(settings.epochs), f"fitting the {settings.kind} translator", enabled=shown):
        network.train()
        order = rows.fitted[torch.randperm(len(rows.fitted)).numpy()]
        for chosen in _pieces(order, settings.batch_size):
            f, z = rows.batch(chosen)
            optimizer.zero_grad()
            F.mse_loss(network(f), z).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        error, since = _error(network, rows), since + 1
        if not np.isfinite(error):
            raise ValueError(f"the training of the {settings.kind} translator diverged in epoch {epoch + 1}")
        if error < best:
            best, since = error, 0
            kept = {name: value.detach().clone() for name, value in network.state_dict().items()}
        if since >= settings.patience:
            break
    return kept, best


@torch.no_grad()
def _error(network: MLPNetwork, rows: "_Rows") -> float:
    network.eval()
    batches = (rows.batch(chosen) for chosen in _pieces(rows.held_out, CHUNK))
    total = sum(float((network(f) - z).double().square().sum()) for f, z in batches)
    return total / (len(rows.held_out) * int(rows.arrays[1].shape[1]))


def _pieces(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return np.split(rows, range(size, len(rows), size))


class _Rows:
    """Rows of two arrays, which may be memory-mapped, read in pieces; and the scales of those fitted on."""

    def __init__(self, features: np.ndarray, targets: np.ndarray, device: torch.device) -> None:
        if features.ndim != 2 or targets.ndim != 2 or len(features) != len(targets):
            raise ValueError(f"expected features (N, m) and targets (N, n), got {features.shape} and {targets.shape}")
        self.arrays, self.device = (features, targets), device
        numbers = np.arange(len(features))
        self.held_out = numbers[numbers % HELD_OUT_EVERY == 0]
        self.fitted = numbers[numbers % HELD_OUT_EVERY != 0]
        if len(self.fitted) < 2:
            raise ValueError(f"an MLP translator needs 2 rows to fit and 1 to hold out, got {len(numbers)} rows")
        mean, variance = self.moments(0, self.fitted)
        target_mean, target_variance = self.moments(1, self.fitted)
        # A constant feature says nothing: scale 0, as in the ridge fit.
        alive = variance > DEAD_FEATURE * (variance + mean.square())
        scale = torch.where(alive, variance.rsqrt(), 0)
        # One scale for all of z, so that the loss stays the paper's squared distance up to a factor.
        spread = target_variance.mean().sqrt()
        if not spread > 0:
            raise ValueError(f"all {len(numbers)} targets are the same, so there is nothing to fit")
        found = {"feature_mean": mean, "feature_scale": scale, "target_mean": target_mean, "target_scale": spread}
        self.scales = {name: value.float().to(device) for name, value in found.items()}

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Standardised (f (B, m), z (B, n)) on the device; sorted, as a memory-mapped file is best read."""
        rows, scales = np.sort(rows), self.scales
        f, z = (self._read(which, rows).to(self.device) for which in (0, 1))
        f = (f - scales["feature_mean"]) * scales["feature_scale"]
        return f, (z - scales["target_mean"]) / scales["target_scale"]

    def moments(self, which: int, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and variance of features (0) or targets (1), float64, about the first row: no large mean is squared."""
        first = self._read(which, rows[:1])[0].double()
        total, square = torch.zeros_like(first), torch.zeros_like(first)
        for chosen in _pieces(rows, CHUNK):
            shifted = self._read(which, chosen).double() - first
            total += shifted.sum(0)
            square += shifted.square().sum(0)
        mean = total / len(rows)
        return first + mean, (square / len(rows) - mean.square()).clamp_min(0)

    def _read(self, which: int, rows: np.ndarray) -> Tensor:
        values = torch.from_numpy(np.asarray(self.arrays[which][rows], dtype=np.float32))
        if not torch.isfinite(values).all():
            bad = rows[~torch.isfinite(values).all(1).numpy()][:5].tolist()
            raise ValueError(f"{('features', 'targets')[which]} hold NaN or infinity in rows {bad}")
        return values
