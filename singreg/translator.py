"""Translators of features into a vision-language model's space, their fits and their files (METHOD section 2)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from singreg.mlp import MLPNetwork, MLPSettings, train_mlp
from singreg.ridge import DEFAULT_RIDGES, RidgeSolution, RidgeStatistics
from singreg.utils import atomic_write


@dataclass(frozen=True)
class TranslatorInfo:
    """What a translator was fitted on; stored in its file and checked when the file is loaded."""

    classifier: str = ""
    head_hash: str = ""
    classifier_preprocessing: str = ""
    vlm: str = ""
    vlm_weights_hash: str = ""
    vlm_preprocessing: str = ""
    images: int = 0
    ridge: float = 0.0  # relative; of a linear one only
    validation_r2: float | None = None
    agreement: float | None = None
    kind: str = "linear"  # or mlp3, mlp4, residual


class Translator(nn.Module):
    """A fixed map T from features (..., m) to (..., n) that lets gradients through; all it holds are buffers."""

    FORMAT: str
    info: TranslatorInfo
    feature_dim: int
    target_dim: int

    def forward(self, features: Tensor) -> Tensor:
        """Translate features, in their dtype. Shape: (..., m) to (..., n)."""
        if features.shape[-1] != self.feature_dim:
            raise ValueError(f"this translator takes features (..., {self.feature_dim}), got {tuple(features.shape)}")
        with torch.autocast(features.device.type, enabled=False):  # angles of a degree are lost in bfloat16
            return self._translate(features)

    def save(self, path: str | Path) -> None:
        """Write the tensors (float32) and the info to a safetensors file, which `load_translator` opens."""
        tensors = {name: value.float().cpu().contiguous() for name, value in self.state_dict().items()}
        metadata = {"format": self.FORMAT, "info": json.dumps(asdict(self.info))}
        if isinstance(self, MLPTranslator):
            metadata["settings"] = json.dumps(asdict(self.settings))
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def _translate(self, features: Tensor) -> Tensor:
        raise NotImplementedError


class LinearTranslator(Translator):
    """T(f) = f Aᵀ + a with matrix A (n, m) and offset a (n,) (paper eq. 4).

    Example:
        >>> T = LinearTranslator(torch.eye(2), torch.ones(2))
        >>> T(torch.tensor([[1.0, 2.0]])).tolist()
        [[2.0, 3.0]]
    """

    FORMAT = "singreg-linear-translator-1"
    matrix: Tensor
    offset: Tensor

    def __init__(self, matrix: Tensor, offset: Tensor, info: TranslatorInfo | None = None) -> None:
        super().__init__()
        if matrix.ndim != 2 or offset.shape != matrix.shape[:1]:
            got = f"{tuple(matrix.shape)} and {tuple(offset.shape)}"
            raise ValueError(f"expected matrix (n, m) and offset (n,), got {got}")
        self.register_buffer("matrix", matrix.detach().clone())
        self.register_buffer("offset", offset.detach().clone())
        self.target_dim, self.feature_dim = matrix.shape
        self.info = info or TranslatorInfo()

    @classmethod
    def from_solution(cls, solution: RidgeSolution, info: TranslatorInfo | None = None) -> "LinearTranslator":
        """Store a float64 ridge solution in float32; its ridge and image count go into the info."""
        info = replace(info or TranslatorInfo(), ridge=solution.ridge, images=solution.count)
        return cls(solution.matrix.float(), solution.offset.float(), info)

    def _translate(self, features: Tensor) -> Tensor:
        return nn.functional.linear(features, self.matrix.to(features), self.offset.to(features))


class MLPTranslator(Translator):
    """T(f) = μ_z + s · net((f − μ_f) / σ_f), computed in the translator's own precision.

    Args:
        state: feature_mean and feature_scale (m,), target_mean (n,), target_scale () and the weights as "network.NAME".

    Example:
        >>> f = np.random.default_rng(0).normal(size=(64, 3))
        >>> T = fit_mlp_translator(f, f[:, :2] ** 2, settings=MLPSettings(hidden=8, epochs=2), progress=False)
        >>> T(torch.from_numpy(f)).shape, len(list(T.parameters())), T.info.kind
        (torch.Size([64, 2]), 0, 'mlp3')
    """

    FORMAT = "singreg-mlp-translator-1"
    feature_mean: Tensor
    feature_scale: Tensor
    target_mean: Tensor
    target_scale: Tensor

    def __init__(self, settings: MLPSettings, state: Mapping[str, Tensor], info: TranslatorInfo | None = None) -> None:
        super().__init__()
        m, n = self.feature_dim, self.target_dim = state["feature_mean"].numel(), state["target_mean"].numel()
        self.settings, self.info = settings, info or TranslatorInfo(kind=settings.kind)
        with torch.device("meta"):  # nothing is allocated before the shapes are known to fit
            self.network = MLPNetwork(m, n, settings)
            sizes = {"feature_mean": (m,), "feature_scale": (m,), "target_mean": (n,), "target_scale": ()}
            for name, size in sizes.items():
                self.register_buffer(name, torch.empty(size))
        for module in self.network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
        self.load_state_dict({name: value.detach().float().clone() for name, value in state.items()}, assign=True)
        self.train(False)

    def train(self, mode: bool = True) -> "MLPTranslator":
        """Stay in eval mode: it is a fixed measuring instrument."""
        return super().train(False)

    def _translate(self, features: Tensor) -> Tensor:
        standard = (features.to(self.feature_mean) - self.feature_mean) * self.feature_scale
        return (self.target_mean + self.target_scale * self.network(standard)).to(features)


def fit_translator(
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    ridges: Sequence[float] = DEFAULT_RIDGES,
    standardize: Tensor | None = None,
    info: TranslatorInfo | None = None,
) -> LinearTranslator:
    """Fit T on a stream of (features, embeddings); two halves of its rows choose λ by agreement (METHOD section 2).

    Over several processes each passes its own batches and all get the same translator.

    Args:
        batches: features (B, m) and embeddings (B, n).
        standardize: see `RidgeStatistics`; a basis (m, r) of the head's row space makes the fit blind to a rotation or
            a rescaling of the null block (METHOD section 8.6).

    Example:
        >>> f = torch.randn(200, 4); A = torch.randn(3, 4)
        >>> bool((fit_translator([(f, f @ A.T)]).matrix - A).abs().max() < 1e-3)
        True
    """
    halves: list[RidgeStatistics] = []
    seen = 0
    for f, z in batches:
        halves = halves or [RidgeStatistics(f.shape[1], z.shape[1], device=f.device) for _ in range(2)]
        update_halves(halves, f, z, torch.arange(seen, seen + len(f)))
        seen += len(f)
    if not halves:
        raise ValueError("no images to fit a translator on: the stream of (features, embeddings) was empty")
    return fit_on_halves(halves, ridges, standardize, info)


def update_halves(halves: Sequence[RidgeStatistics], features: Tensor, targets: Tensor, places: Tensor) -> None:
    """Add every row to one of two halves by its place (B,); mixed, since labels may take turns as even and odd do."""
    mine = ((places + 1) * 2654435761 % 2**32 < 2**31).to(features.device)
    for half, rows in zip(halves, (mine, ~mine), strict=True):
        half.update(features[rows], targets[rows])


def fit_on_halves(
    halves: Sequence[RidgeStatistics], ridges: Sequence[float], standardize: Tensor | None, info: TranslatorInfo | None
) -> LinearTranslator:
    """Sum over processes, choose λ by the agreement of the two halves, then solve on both together."""
    first, second = (half.reduce() for half in halves)
    ridge, r2, agreement = first.agreed(second, ridges=ridges, standardize=standardize)
    found = replace(info or TranslatorInfo(), validation_r2=r2, agreement=agreement)
    return LinearTranslator.from_solution((first + second).solve(ridge, standardize=standardize), found)


def fit_mlp_translator(
    features: np.ndarray,
    targets: np.ndarray,
    *,
    settings: MLPSettings | None = None,
    info: TranslatorInfo | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> MLPTranslator:
    """Fit a non-linear T by mean squared error on rows f (N, m) and z (N, n); every fifth decides when to stop.

    Memory does not grow with N when the arrays are memory-mapped. In a process group every process passes the same
    arrays; the first one's weights go to all.
    """
    settings = settings or MLPSettings()
    state, images, r2 = train_mlp(features, targets, settings, torch.device(device), progress)
    info = replace(info or TranslatorInfo(), kind=settings.kind, images=images, validation_r2=r2)
    return MLPTranslator(settings, state, info).to(device)


def load_translator(
    path: str | Path, *, expected: TranslatorInfo | None = None, widths: tuple[int, int] | None = None
) -> Translator:
    """Read a translator file of either kind; nothing in it is unpickled, and shapes are checked before use.

    Args:
        path: a .safetensors file written by a translator's `.save`, or the paper's authors' .pt: a state dict with
            weight (n, m) and bias (n,), which does not say what it was fitted on.
        expected: what it must have been fitted on; its non-empty text fields but the kind are compared.
        widths: m of the features it must take and n of the embeddings it must give.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "t.safetensors"
        >>> LinearTranslator(torch.eye(2), torch.zeros(2), TranslatorInfo(vlm="A")).save(path)
        >>> load_translator(path, expected=TranslatorInfo(vlm="A")).info.vlm
        'A'
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no translator file at {path}; fit one with `fit_translator` and `.save(path)`")
    released = Path(path).suffix == ".pt"
    try:
        translator = _read_released(path) if released else _read_saved(path)
    except Exception as error:  # of damaged files safetensors and torch raise nearly anything
        said = str(error).partition(". ")[0]  # torch goes on with advice to unpickle
        raise ValueError(f"{path} is damaged or not a translator file: {said}") from error
    differences = [
        f"  {name}: it was fitted on {getattr(translator.info, name)!r}, here it is {wanted!r}"
        for name, wanted in asdict(expected or TranslatorInfo()).items()
        if isinstance(wanted, str) and wanted and name != "kind" and getattr(translator.info, name) != wanted
    ]
    if differences and not released:
        raise ValueError(f"the translator {path} belongs to another setting; fit a new one:\n" + "\n".join(differences))
    if widths not in (None, (translator.feature_dim, translator.target_dim)):
        takes = f"takes features of {translator.feature_dim} and gives embeddings of {translator.target_dim}"
        raise ValueError(f"the translator {path} {takes}, the classifier and the VLM have {widths}; give one of theirs")
    return translator


def _read_released(path: str | Path) -> Translator:
    """A linear layer's state dict, as the paper's authors released theirs."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if set(state) != {"weight", "bias"}:
        raise ValueError(f"expected a state dict of weight and bias, got {', '.join(map(str, state))[:60]}")
    return LinearTranslator(state["weight"].float(), state["bias"].float())


def _read_saved(path: str | Path) -> Translator:
    known = {field.name for field in fields(TranslatorInfo)}
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") not in (LinearTranslator.FORMAT, MLPTranslator.FORMAT):
            raise ValueError(f"unknown format {metadata.get('format')!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    # keys of the info that later versions wrote are left out
    info = TranslatorInfo(**{key: value for key, value in json.loads(metadata["info"]).items() if key in known})
    if metadata["format"] == LinearTranslator.FORMAT:
        return LinearTranslator(tensors["matrix"], tensors["offset"], info)
    return MLPTranslator(MLPSettings(**json.loads(metadata["settings"])), tensors, info)
