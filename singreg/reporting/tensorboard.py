"""TensorBoard: one small writer that refuses what TensorBoard would drop without a word."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as one level, "a.b" keys, with only the kinds of value that hparams show (no shapes).

    Example:
        >>> flatten({"loss": {"weight": 0.1, "terms": None}, "templates": ["a", "b"]})
        {'loss.weight': 0.1, 'loss.terms': 'none', 'templates': 'a, b'}
    """
    flat: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif value is None:
            flat[name] = "none"
        elif isinstance(value, (bool, int, float)):
            flat[name] = value
        else:
            flat[name] = _utf8(", ".join(str(item) for item in value) if isinstance(value, (list, tuple)) else str(value))
    return flat


def _utf8(text: str) -> str:
    """Text that can be written: a folder's name may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def as_number(name: str, value: Any) -> float:
    """A plain float of any real number or one-element tensor or array, shape ().

    Raises:
        TypeError: anything else, with its name.
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        array = value.detach().cpu() if isinstance(value, Tensor) else np.asarray(value)
        real = not array.is_complex() if isinstance(array, Tensor) else array.dtype.kind in "biuf"
        if not real:
            raise TypeError(f"figure {name!r}: expected a real number, got {array.dtype}")
        if int(np.prod(array.shape)) == 1:
            return float(array.reshape(()))
        raise TypeError(f"figure {name!r}: expected one number, got shape {tuple(array.shape)}; use histograms() for vectors")
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"figure {name!r}: expected a number, got {type(value).__name__}")


class TensorBoardLog:
    """A TensorBoard folder (path); with `enabled=False` (other processes) every call does nothing.

    Example:
        >>> import tempfile
        >>> with TensorBoardLog(tempfile.mkdtemp()) as log:
        ...     log.scalars({"train/ce": torch.tensor(0.5)}, step=1)
    """

    def __init__(self, folder: str | Path, enabled: bool = True) -> None:
        self._writer = SummaryWriter(str(folder), flush_secs=15) if enabled else None

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Log numbers by tag; anything that is not one number raises (shapes ())."""
        numeric = {name: as_number(name, value) for name, value in values.items()}
        if self._writer is not None:
            for name, value in numeric.items():
                self._writer.add_scalar(name, value, step)

    def histograms(self, values: Mapping[str, Any], step: int) -> None:
        """Log distributions by tag, any shape; values that are not finite are left out of the drawing."""
        for name, value in values.items():
            flat = torch.as_tensor(value).detach().float().flatten().cpu()
            flat = flat[torch.isfinite(flat)]
            if self._writer is not None and len(flat):
                self._writer.add_histogram(name, flat, step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Log a matplotlib figure as an image (H, W, 3)."""
        if self._writer is not None:
            assert isinstance(figure, Figure)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()  # type: ignore[no-untyped-call]
            pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
            self._writer.add_image(tag, pixels[..., :3], step, dataformats="HWC")
            pyplot.close(figure)  # pyplot keeps every figure it made until it is told

    def images(self, tag: str, images: Tensor, step: int) -> None:
        """Log pictures (B, 3, H, W) in [0, 1] as a grid."""
        if self._writer is not None:
            self._writer.add_images(tag, images, step)

    def image_file(self, tag: str, path: Path, step: int) -> None:
        """Log a picture file, (H, W, 3)."""
        if self._writer is not None:
            with Image.open(path) as picture:
                self._writer.add_image(tag, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def text(self, tag: str, text: str, step: int) -> None:
        """Log Markdown text (no shapes)."""
        if self._writer is not None:
            self._writer.add_text(tag, _utf8(text), step)

    def hparams(self, settings: Mapping[str, Any], final: Mapping[str, Any]) -> None:
        """Log nested settings with the final figures, into this very folder (no shapes)."""
        numeric = {name: as_number(name, value) for name, value in final.items()}
        if self._writer is None:
            return
        # SummaryWriter.add_hparams would start a second run in a folder named by the clock.
        for summary in hparams(flatten(settings), numeric):  # type: ignore[no-untyped-call]
            self._writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
        self.scalars(numeric, 0)

    def close(self) -> None:
        """Flush and close the files (no shapes)."""
        if self._writer is not None:
            self._writer.close()
