"""Pictures of the shift by a diffusion model: embeddings drawn by diffusers' UnCLIP pipeline (extra `singreg[unclip]`).

Only embeddings of the CLIP the decoder was trained with mean anything to it: for the default one, OpenAI's ViT-L/14.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from singreg.nullspace import NullSpace
from singreg.reporting.plots import drawable
from singreg.translator import Translator
from singreg.utils import progress as with_progress

KARLO = "kakaobrain/karlo-v1-alpha-image-variations"
"""Decodes the image embeddings (768-d) of OpenAI's CLIP ViT-L/14, the paper's VLM."""


def rescale_norm(z: Tensor, real: Tensor) -> Tensor:
    """z · |z_real| / |z|, row by row (paper eq. 19): a decoder only knows embeddings of the norm that CLIP gives pictures.

    Shapes: z (N, n), real (N, n) the VLM's own embeddings of the same pictures; returns (N, n).

    Raises:
        ValueError: other shapes, or a row of z without a direction (0 or not finite).

    Example:
        >>> rescale_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]])).tolist()
        [[6.0, 8.0]]
    """
    if z.ndim != 2 or z.shape != real.shape:
        raise ValueError(f"expected z and the real embeddings of the same pictures, both (N, n), got {tuple(z.shape)}, {tuple(real.shape)}")
    norm = torch.linalg.vector_norm(z.float(), dim=1, keepdim=True)
    bad = (~(torch.isfinite(norm) & (norm > 0))).flatten().nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"rows {bad[:5]} of z are 0 or not finite, so they point nowhere and cannot be drawn")
    scaled: Tensor = z.float() / norm * torch.linalg.vector_norm(real.float(), dim=1, keepdim=True)
    return scaled


class UnclipRenderer:
    """Draws image embeddings with an UnCLIPImageVariationPipeline; the same noise for all pictures of a row.

    Make one with `from_pretrained`, or from a pipeline of your own. Width: (n,) of the embeddings it takes.
    """

    def __init__(self, pipeline: Any, *, decoder_steps: int = 25, super_resolution_steps: int = 7) -> None:
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.steps = {"decoder_num_inference_steps": decoder_steps, "super_res_num_inference_steps": super_resolution_steps}

    @classmethod
    def from_pretrained(
        cls, name: str = KARLO, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **steps: int
    ) -> UnclipRenderer:
        """Load a pipeline, part by part, by its hub name or folder (path). Nothing in it is run: PyTorch files are read as weights only.

        Raises:
            ImportError: diffusers or transformers is missing. OSError: no such pipeline, or no network.
        """
        pipeline_class, parts = _pipeline_parts()
        # Not by the pipeline's own loader: newer versions of it do not find the projection where the published pipelines say it is.
        loaded = {part: kind.from_pretrained(name, subfolder=part) for part, kind in parts.items()}
        return cls(pipeline_class(**loaded).to(device=device, dtype=dtype), **steps)

    @property
    def width(self) -> int:
        """n, the width of the embeddings that the pipeline's decoder takes."""
        return int(self.pipeline.text_proj.config.clip_embeddings_dim)

    def render(
        self, columns: Mapping[str, Tensor], real: Tensor, *, seed: int = 0, guidance: float = 8.0, progress: bool = True
    ) -> dict[str, np.ndarray]:
        """A picture for every embedding, each column rescaled to the norms of the real ones (paper eq. 19).

        Row i of every column starts from the same noise and gets the same noise at every step (seed + i), so that what differs
        between the pictures of a row comes from the embeddings alone.

        Shapes: columns of (N, n), real (N, n); returns (N, H, W, 3) float32 in [0, 1] by column.

        Raises:
            ValueError: no columns, or embeddings of another width than the pipeline's.
        """
        if not columns:
            raise ValueError("there is no column of embeddings to draw")
        for name, z in {**columns, "real": real}.items():
            if z.ndim != 2 or z.shape[1] != self.width:
                raise ValueError(
                    f"this pipeline draws {self.width}-dimensional embeddings; {name!r} is {tuple(z.shape)}. Translate into the CLIP "
                    "it was trained with (ViT-L-14 with pretrained: openai for the default one)"
                )
        scaled = {name: rescale_norm(z, real.to(z.device)) for name, z in columns.items()}
        rows = [
            {name: self._one(z[row], seed + row, guidance) for name, z in scaled.items()}
            for row in with_progress(range(len(real)), "drawing embeddings", enabled=progress)
        ]
        return {name: np.stack([row[name] for row in rows]) for name in columns}

    def _one(self, z: Tensor, seed: int, guidance: float) -> np.ndarray:
        """One embedding (n,) as a picture (H, W, 3); a generator of its own, since the schedulers draw noise at every step."""
        device = self.pipeline.device
        dtype = next(self.pipeline.decoder.parameters()).dtype
        drawn = self.pipeline(
            image_embeddings=z[None].to(device=device, dtype=dtype),
            generator=torch.Generator(device=device).manual_seed(seed),
            decoder_guidance_scale=guidance,
            output_type="np",
            **self.steps,
        )
        picture: np.ndarray = np.asarray(drawn.images[0], dtype=np.float32).clip(0, 1)
        return picture


def check_extra() -> None:
    """Raise an ImportError that says what to install, unless diffusers and transformers are there (no shapes)."""
    _pipeline_parts()


def _pipeline_parts() -> tuple[Any, dict[str, Any]]:
    """The pipeline's class, and the class of each of its parts by the part's folder."""
    try:
        import diffusers
        import transformers

        pipeline_class = diffusers.UnCLIPImageVariationPipeline
        # Where the projection lives changes with the version; the pipeline's own module has it in all of them.
        projection = sys.modules[pipeline_class.__module__].UnCLIPTextProjModel  # type: ignore[attr-defined]
    except (ImportError, RuntimeError, AttributeError) as error:  # diffusers turns what transformers lacks into a RuntimeError
        raise ImportError(
            f'drawing embeddings needs diffusers, transformers and accelerate: pip install "singreg[unclip]" ({error})'
        ) from error
    return pipeline_class, {
        "decoder": diffusers.UNet2DConditionModel,
        "text_encoder": transformers.CLIPTextModelWithProjection,
        "tokenizer": transformers.CLIPTokenizer,
        "text_proj": projection,
        "feature_extractor": transformers.CLIPImageProcessor,
        "image_encoder": transformers.CLIPVisionModelWithProjection,
        "super_res_first": diffusers.UNet2DModel,
        "super_res_last": diffusers.UNet2DModel,
        "decoder_scheduler": diffusers.UnCLIPScheduler,
        "super_res_scheduler": diffusers.UnCLIPScheduler,
    }


@torch.no_grad()
def shift_columns(
    features: Tensor, translator: Translator, null_space: NullSpace, real: Tensor, *, steered: Tensor | None = None
) -> dict[str, Tensor]:
    """What a row of pictures shows: the real embedding, T(f), T(f~) and, where given, T of the steered feature.

    Shapes: features and steered (N, m), real (N, n); returns (N, n) by title. For translators to raw (not unit) targets and to
    unit ones alike, since norms are rescaled.

    Example:
        >>> from singreg.translator import LinearTranslator
        >>> T, space = LinearTranslator(torch.eye(3), torch.zeros(3)), NullSpace.from_weight(torch.eye(3)[:1])
        >>> list(shift_columns(torch.ones(1, 3), T, space, torch.ones(1, 3)))
        ['CLIP', 'T(f)', 'T(f~)']
    """
    columns = {"CLIP": real, "T(f)": translator(features), "T(f~)": translator(null_space.remove(features))}
    return columns if steered is None else {**columns, "steered": translator(steered)}


def draw_rows(rendered: Mapping[str, np.ndarray], captions: list[str], pictures: np.ndarray | None = None) -> Figure:
    """A sheet: a row for every picture (captions (N,)), a column for every embedding; the pictures (N, H, W, 3) first.

    Raises:
        ValueError: another number of captions or pictures than rows.
    """
    columns = {**({} if pictures is None else {"picture": pictures}), **rendered}
    count = len(captions)
    wrong = {name: len(drawn) for name, drawn in columns.items() if len(drawn) != count}
    if wrong or not columns:
        raise ValueError(f"expected {count} pictures in every column, one for each caption, got {wrong or 'no column'}")
    figure = Figure(figsize=(2.2 * len(columns), 2.35 * count + 0.4), layout="constrained")
    axes = figure.subplots(count, len(columns), squeeze=False)
    for place, (title, drawn) in enumerate(columns.items()):
        for row in range(count):
            panel = axes[row, place]
            panel.imshow(drawn[row].clip(0, 1))
            panel.set(xticks=[], yticks=[])
            if row == 0:
                panel.set_title(title, fontsize=10)
            if place == 0:
                panel.set_ylabel(drawable(captions[row]), fontsize=8)
    return figure
