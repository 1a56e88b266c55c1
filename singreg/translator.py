"""Translators of features into a vision-language model's space (METHOD section 2)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from singreg.old_seals import check_tensors, seal_of_tensors
from singreg.ridge import DEFAULT_RIDGES, RidgeSolution, RidgeStatistics, Standardize
from singreg.utils import atomic_write


@dataclass(frozen=True)
class TranslatorInfo:
    """What a translator was fitted on. It is stored in the file and checked when the file is loaded.

    kind is "linear", "mlp3", "mlp4" or "residual"; ridge belongs to the linear one only. by_block: standardised by the head's
    row-space and null block, not feature by feature.
    """

    classifier: str = ""
    head_hash: str = ""
    classifier_preprocessing: str = ""
    vlm: str = ""
    vlm_weights_hash: str = ""
    vlm_preprocessing: str = ""
    images: int = 0
    ridge: float = 0.0
    standardized: bool = False
    normalized_targets: bool = False
    validation_r2: float | None = None
    held_out_cosine: float | None = None
    held_out_r2: float | None = None
    kind: str = "linear"
    by_block: bool = False


class Translator(nn.Module):
    """Base of all translators: T maps (..., m) to (..., n), has no parameter to train, and lets gradients through to features."""

    info: TranslatorInfo

    @property
    def feature_dim(self) -> int:
        """m, the width of the features it takes."""
        raise NotImplementedError(f"{type(self).__name__} must define feature_dim")

    @property
    def target_dim(self) -> int:
        """n, the width of the vision-language model's space."""
        raise NotImplementedError(f"{type(self).__name__} must define target_dim")

    def forward(self, features: Tensor) -> Tensor:
        """Translated features. Shapes: (..., m) to (..., n)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file to the path, atomically; `load_translator` opens it (no shapes)."""
        raise NotImplementedError(f"{type(self).__name__} must define save")

    def check_width(self, features: Tensor) -> None:
        """Raise a ValueError unless features are (..., m)."""
        if features.shape[-1] != self.feature_dim:
            raise ValueError(f"this translator takes features (..., {self.feature_dim}), got {tuple(features.shape)}")


def info_from_stored(stored: Any) -> TranslatorInfo:
    """The info as a file has it (a mapping; keys of later versions are left out; no shapes).

    Raises:
        TypeError: it is no mapping.
    """
    if not isinstance(stored, dict):
        raise TypeError(f"expected a mapping of what it was fitted on, got {type(stored).__name__}")
    known = {field.name for field in fields(TranslatorInfo)}
    return TranslatorInfo(**{key: value for key, value in stored.items() if key in known})


def check_fit(info: TranslatorInfo, expected: TranslatorInfo, path: str) -> None:
    """Raise a ValueError that names every field in which a translator (read from `path`) is not the expected one.

    The kind is not compared: it says what a translator is, not what it belongs to.
    """
    differences = [
        f"  {field.name}: it was fitted on {getattr(info, field.name)!r}, here it is {getattr(expected, field.name)!r}"
        for field in fields(TranslatorInfo)
        if isinstance(getattr(expected, field.name), str)
        and field.name != "kind"
        and getattr(expected, field.name)
        and getattr(info, field.name) != getattr(expected, field.name)
    ]
    if differences:
        raise ValueError(f"the translator {path} belongs to another setting; fit a new one:\n" + "\n".join(differences))


__all__ = [
    "FORMAT", "LinearTranslator", "Translator", "TranslatorInfo", "check_fit", "fit_translator", "load_translator",
    "translator_from_statistics",
]  # fmt: skip

FORMAT = "singreg-linear-translator-1"


class LinearTranslator(Translator):
    """T(f) = f Aᵀ + a (paper eq. 4). Buffers, not parameters: nobody trains it by accident.

    Shapes: matrix A (n, m), offset a (n,); forward (..., m) to (..., n).

    Example:
        >>> T = LinearTranslator(torch.eye(2), torch.ones(2))
        >>> T(torch.tensor([[1.0, 2.0]])).tolist()
        [[2.0, 3.0]]
    """

    matrix: Tensor
    offset: Tensor

    def __init__(self, matrix: Tensor, offset: Tensor, info: TranslatorInfo | None = None) -> None:
        super().__init__()
        if matrix.ndim != 2 or offset.shape != matrix.shape[:1]:
            raise ValueError(f"expected matrix (n, m) and offset (n,), got {tuple(matrix.shape)} and {tuple(offset.shape)}")
        self.register_buffer("matrix", matrix.detach().clone())
        self.register_buffer("offset", offset.detach().clone())
        self.info = info or TranslatorInfo()

    @classmethod
    def from_solution(cls, solution: RidgeSolution, info: TranslatorInfo | None = None) -> LinearTranslator:
        """From a float64 ridge solution, stored in float32; ridge and image count go into the info."""
        known = replace(info or TranslatorInfo(), ridge=solution.ridge, images=solution.count)
        return cls(solution.matrix.float(), solution.offset.float(), known)

    @property
    def feature_dim(self) -> int:
        """m, the width of the features it takes."""
        return self.matrix.shape[1]

    @property
    def target_dim(self) -> int:
        """n, the width of the vision-language model's space."""
        return self.matrix.shape[0]

    def forward(self, features: Tensor) -> Tensor:
        """Translated features, outside autocast: angles of a degree are lost in bfloat16. Shapes: (..., m) to (..., n)."""
        self.check_width(features)
        with torch.autocast(features.device.type, enabled=False):
            return nn.functional.linear(features, self.matrix.to(features), self.offset.to(features))

    def save(self, path: str | Path) -> None:
        """Write A, a (float32) and the info to a safetensors file at the path, atomically."""
        tensors = {"matrix": self.matrix.cpu().contiguous(), "offset": self.offset.cpu().contiguous()}
        metadata = {"format": FORMAT, "info": json.dumps(asdict(self.info))}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=seal_of_tensors(tensors, metadata))


def load_translator(path: str | Path, *, expected: TranslatorInfo | None = None) -> Translator:
    """Read a translator file of either kind, linear or MLP; nothing in it is unpickled, and shapes are checked before use.

    Args:
        path: a .safetensors file written by a translator's `.save`.
        expected: what it must have been fitted on; its non-empty text fields (classifier, head hash, VLM, preprocessing) are
            compared and every difference is named.

    Raises:
        FileNotFoundError, ValueError: no such file; not a translator; damaged; or fitted on something else.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "t.safetensors"
        >>> LinearTranslator(torch.eye(2), torch.zeros(2), TranslatorInfo(vlm="A")).save(path)
        >>> load_translator(path, expected=TranslatorInfo(vlm="A")).info.vlm
        'A'
    """
    from singreg.mlp import FORMAT as MLP_FORMAT

    if not Path(path).is_file():
        raise FileNotFoundError(f"no translator file at {path}; fit one with `fit_translator` and `.save(path)`")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            kind = metadata.get("format")
            if kind not in (FORMAT, MLP_FORMAT):
                raise ValueError(f"it is not a translator file: expected format {FORMAT!r} or {MLP_FORMAT!r}, got {kind!r}")
            info = info_from_stored(json.loads(metadata["info"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        check_tensors(tensors, metadata)
        translator = _assemble(str(kind), tensors, metadata, info)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or not a translator file: {error}") from error
    except ValueError as error:
        raise ValueError(f"the translator file {path} cannot be used: {error}") from error
    if expected is not None:
        check_fit(info, expected, str(path))
    return translator


def _assemble(kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], info: TranslatorInfo) -> Translator:
    """The module of what a file holds; each constructor checks the shapes."""
    if kind == FORMAT:
        return LinearTranslator(tensors["matrix"], tensors["offset"], info)
    from singreg.mlp import MLPSettings, MLPTranslator

    return MLPTranslator(MLPSettings(**json.loads(metadata["settings"])), tensors, info)


def fit_translator(
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    ridges: Sequence[float] = DEFAULT_RIDGES,
    standardize: Standardize = False,
    validation_every: int = 5,
    info: TranslatorInfo | None = None,
) -> LinearTranslator:
    """Fit T on a stream of (features (B, m), VLM embeddings (B, n)); every 5th row chooses λ, then all rows fit T.

    Over several processes each passes its own batches and all get the same translator.
    `standardize`: a basis (m, r) of the head's row space scales its two blocks, which makes the fit blind to a rotation or a
    rescaling of the null block (METHOD section 8.6); True scales single features.

    Raises:
        ValueError: the stream is empty, or its shapes change.

    Example:
        >>> f = torch.randn(200, 4); A = torch.randn(3, 4)
        >>> bool((fit_translator([(f, f @ A.T)]).matrix - A).abs().max() < 1e-3)
        True
    """
    parts: list[RidgeStatistics] = []
    seen = 0
    for features, targets in batches:
        parts = parts or [RidgeStatistics(features.shape[1], targets.shape[1], device=features.device) for _ in range(2)]
        held_out = (torch.arange(seen, seen + len(features), device=features.device) % validation_every) == 0
        parts[0].update(features[~held_out], targets[~held_out])
        parts[1].update(features[held_out], targets[held_out])
        seen += len(features)
    if not parts:
        raise ValueError("no images to fit a translator on: the stream of (features, embeddings) was empty")
    return translator_from_statistics(
        parts[0].reduce(), parts[1].reduce(), ridges=ridges, standardize=standardize, info=info
    )


def translator_from_statistics(
    fit: RidgeStatistics,
    validation: RidgeStatistics,
    *,
    ridges: Sequence[float] = DEFAULT_RIDGES,
    standardize: Standardize = False,
    info: TranslatorInfo | None = None,
) -> LinearTranslator:
    """Choose λ by R² on `validation`, then solve on both parts together; sums over (m, m) and (m, n) only."""
    chosen, scores = fit.validate(validation, ridges=ridges, standardize=standardize)
    ridge = chosen.ridge
    whole = RidgeStatistics(*fit.fz.shape, device=fit.ff.device).merge(fit).merge(validation)
    blocks = isinstance(standardize, Tensor)
    described = replace(
        info or TranslatorInfo(), standardized=bool(blocks or standardize), by_block=blocks, validation_r2=scores[ridge]
    )
    return LinearTranslator.from_solution(whole.solve(ridge, standardize=standardize), described)
