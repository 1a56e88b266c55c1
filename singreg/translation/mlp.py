"""Non-linear translators: 3-layer, 4-layer and residual MLPs of LayerNorm-GELU-Dropout-Linear blocks (METHOD section 2)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from singreg.files import atomic_write
from singreg.sealed import seal_of_tensors
from singreg.translation.base import Translator, TranslatorInfo

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
        >>> from singreg.translation.mlp_fitting import fit_mlp_translator
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
