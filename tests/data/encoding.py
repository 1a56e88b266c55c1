"""A counting encoder, a part for it, and what each of several processes does; light to import, since processes import it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from singreg.data import FolderSplit, cached_embeddings
from tests.data.pictures_for_tests import write_picture


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels in [0, 1], (3, H, W); torchvision's does the same but takes each process seconds to import."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


class Encoder:
    """A fixed linear map of the pixels, which counts the pictures it has seen."""

    def __init__(self, seed: int = 0) -> None:
        self.weight = torch.randn(9 * 7 * 3, 4, generator=torch.Generator().manual_seed(seed))
        self.weights_hash, self.preprocessing, self.dim = f"weights-{seed}", {"size": [9, 7]}, 4
        self.transform: Callable[[Any], Tensor] = to_tensor
        self.seen = 0

    def embed_images(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.flatten(1) @ self.weight


def make_part(folder: Path, count: int = 11) -> FolderSplit:
    paths = [str(write_picture(folder / f"{index}.png", index)) for index in range(count)]
    return FolderSplit("audit", paths, ["x"], [0] * count)


def one_by_one(encoder: Encoder, part: FolderSplit) -> np.ndarray:
    rows = [encoder.embed_images(encoder.transform(part.image(index))[None])[0] for index in range(len(part))]
    return torch.stack(rows).numpy()


def encode_in_process(rank: int, world: int, folder: str) -> None:
    """Encode 5 pictures together, then 1 (one process has none), then fail on one process: all must notice."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    part = make_part(Path(folder) / f"pictures-{rank}", 5)
    encoder = Encoder()
    rows = cached_embeddings(encoder, part, Path(folder) / "cache", batch_size=2, progress=False)
    alone = cached_embeddings(encoder, part.subset([3]), Path(folder) / "cache", progress=False)
    if rank == 0:
        encoder.embed_images = lambda images: images.flatten(1)[:, :4] / 0  # type: ignore[method-assign]
    encoder.weights_hash = "failing"
    try:
        cached_embeddings(encoder, part, Path(folder) / "cache", progress=False)
        failure = "none"
    except (ValueError, RuntimeError) as error:
        failure = str(error)
    report = {"seen": encoder.seen, "rows": rows.tolist(), "alone": alone.tolist(), "failure": failure}
    (Path(folder) / f"report-{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()
