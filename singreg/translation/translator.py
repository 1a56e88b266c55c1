"""The linear translator as a module, and as a safetensors file that says what it was fitted on (METHOD section 2)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from singreg.files import atomic_write
from singreg.translation.ridge import DEFAULT_RIDGES, RidgeSolution, RidgeStatistics

FORMAT = "singreg-linear-translator-1"


@dataclass(frozen=True)
class TranslatorInfo:
    """What a translator was fitted on. It is stored in the file and checked when the file is loaded."""

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


class LinearTranslator(nn.Module):
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

    def forward(self, features: Tensor) -> Tensor:
        """Translated features. Shapes: (..., m) to (..., n)."""
        if features.shape[-1] != self.matrix.shape[1]:
            raise ValueError(f"this translator takes features (..., {self.matrix.shape[1]}), got {tuple(features.shape)}")
        return nn.functional.linear(features, self.matrix.to(features), self.offset.to(features))

    def save(self, path: str | Path) -> None:
        """Write A, a (float32) and the info to a safetensors file at the path, atomically."""
        tensors = {"matrix": self.matrix.cpu().contiguous(), "offset": self.offset.cpu().contiguous()}
        metadata = {"format": FORMAT, "info": json.dumps(asdict(self.info))}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)


def load_translator(path: str | Path, *, expected: TranslatorInfo | None = None) -> LinearTranslator:
    """Read a translator file; nothing in it is unpickled.

    Args:
        path: a .safetensors file written by `LinearTranslator.save`.
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
    if not Path(path).is_file():
        raise FileNotFoundError(f"no translator file at {path}; fit one with `fit_translator` and `.save(path)`")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is not a translator file: expected format {FORMAT!r}, got {metadata.get('format')!r}")
            stored: dict[str, Any] = json.loads(metadata["info"])
            matrix, offset = file.get_tensor("matrix"), file.get_tensor("offset")
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or not a translator file: {error}") from error
    known = {field.name for field in fields(TranslatorInfo)}
    info = TranslatorInfo(**{key: value for key, value in stored.items() if key in known})
    if expected is not None:
        check_fit(info, expected, str(path))
    return LinearTranslator(matrix, offset, info)


def check_fit(info: TranslatorInfo, expected: TranslatorInfo, path: str) -> None:
    """Raise a ValueError that names every field in which a translator (read from `path`) is not the expected one."""
    differences = [
        f"  {field.name}: it was fitted on {getattr(info, field.name)!r}, here it is {getattr(expected, field.name)!r}"
        for field in fields(TranslatorInfo)
        if isinstance(getattr(expected, field.name), str)
        and getattr(expected, field.name)
        and getattr(info, field.name) != getattr(expected, field.name)
    ]
    if differences:
        raise ValueError(f"the translator {path} belongs to another setting; fit a new one:\n" + "\n".join(differences))


def fit_translator(
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    ridges: Sequence[float] = DEFAULT_RIDGES,
    standardize: bool = False,
    validation_every: int = 5,
    info: TranslatorInfo | None = None,
) -> LinearTranslator:
    """Fit T on a stream of (features (B, m), VLM embeddings (B, n)); every 5th row chooses λ, then all rows fit T.

    Over several processes each passes its own batches and all get the same translator.

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
    standardize: bool = False,
    info: TranslatorInfo | None = None,
) -> LinearTranslator:
    """Choose λ by R² on `validation`, then solve on both parts together; sums over (m, m) and (m, n) only."""
    chosen, scores = fit.validate(validation, ridges=ridges, standardize=standardize)
    ridge = chosen.ridge
    whole = RidgeStatistics(*fit.fz.shape, device=fit.ff.device).merge(fit).merge(validation)
    described = replace(info or TranslatorInfo(), standardized=standardize, validation_r2=scores[ridge])
    return LinearTranslator.from_solution(whole.solve(ridge, standardize=standardize), described)
