"""Embeddings drawn as images by diffusers' UnCLIP pipeline (extra `singreg[unclip]`).

Only embeddings of the CLIP that the decoder was trained with mean anything to it: OpenAI's ViT-L/14 for the default.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import ImageOps
from torch import Tensor

from singreg.analysis.steering import PairPlan, steering_arguments
from singreg.nullspace import NullSpace
from singreg.plots.steering import draw_sheet
from singreg.setup import Setup
from singreg.steering import steer
from singreg.translator import LinearTranslator
from singreg.utils import progress as with_progress

KARLO = "kakaobrain/karlo-v1-alpha-image-variations"
"""Decodes the image embeddings (768-d) of OpenAI's CLIP ViT-L/14, the paper's VLM."""
GUIDANCE, SIDE = 8.0, 256


def rescale_norm(z: Tensor, real: Tensor) -> Tensor:
    """Return z · |z_real| / |z| row by row (paper eq. 19): a decoder only knows the norms that CLIP gives images.

    Shape: z and real (N, n), real the VLM's own embeddings of the same images; returns (N, n).

    Raises:
        ValueError: other shapes, or a row of z without a direction (0 or not finite).

    Example:
        >>> rescale_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]])).tolist()
        [[6.0, 8.0]]
    """
    if z.ndim != 2 or z.shape != real.shape:
        raise ValueError(f"expected z and the real embeddings, both (N, n), got {tuple(z.shape)}, {tuple(real.shape)}")
    norm = torch.linalg.vector_norm(z.float(), dim=1, keepdim=True)
    bad = (~(torch.isfinite(norm) & (norm > 0))).flatten().nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"rows {bad[:5]} of z are 0 or not finite, so they point nowhere and cannot be drawn")
    scaled: Tensor = z.float() / norm * torch.linalg.vector_norm(real.float(), dim=1, keepdim=True)
    return scaled


def open_pipeline(name: str = KARLO, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Open an UnCLIPImageVariationPipeline by its hub name or folder; PyTorch files in it are read as weights only.

    Raises:
        ImportError: diffusers or transformers is missing.
        OSError: no such pipeline, or no network.
    """
    pipeline_class, parts = pipeline_parts()
    # Not by the pipeline's own loader: newer versions do not find the projection where published pipelines say it is.
    loaded = {part: kind.from_pretrained(name, subfolder=part) for part, kind in parts.items()}
    return pipeline_class(**loaded).to(device=device, dtype=dtype)


def open_asked(name: str | None, accelerator: Accelerator) -> Any:
    """Open a pipeline as a configuration asks for it, on the main process; None elsewhere and for None.

    Raises:
        ValueError: the extra is not installed, or there is no such pipeline.
    """
    if name is None:
        return None
    try:
        pipeline_parts()  # on every process, so that all of them stop
        return open_pipeline(name, device=accelerator.device) if accelerator.is_main_process else None
    except (ImportError, OSError) as error:
        raise ValueError(f"unclip: {error}") from error


def embedding_width(pipeline: Any) -> int:
    """Return the width n of the embeddings that a pipeline's decoder takes."""
    return int(pipeline.text_proj.config.clip_embeddings_dim)


def pipeline_parts() -> tuple[Any, dict[str, Any]]:
    """Return the pipeline's class, and the class of each of its parts by the part's folder.

    Raises:
        ImportError: diffusers or transformers is missing; says what to install.
    """
    try:
        import diffusers
        import transformers

        pipeline_class = diffusers.UnCLIPImageVariationPipeline
        # Where the projection lives changes with the version; the pipeline's own module has it in all of them.
        projection = vars(sys.modules[pipeline_class.__module__])["UnCLIPTextProjModel"]
    except (ImportError, RuntimeError, AttributeError, KeyError) as error:  # RuntimeError: what diffusers makes of it
        raise ImportError(f'drawing embeddings needs pip install "singreg[unclip]" ({error})') from error
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


def render(
    pipeline: Any,
    columns: Mapping[str, Tensor],
    real: Tensor,
    *,
    seed: int = 0,
    decoder_steps: int = 25,
    super_resolution_steps: int = 7,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Draw an image for every embedding, each column rescaled to the norms of the real ones (paper eq. 19).

    Row i of every column gets the same noise at every step (seed + i), so that what differs between the images of a row
    comes from the embeddings alone.

    Shape: columns of (N, n), real (N, n); returns (N, H, W, 3) float32 in [0, 1] by column.

    Raises:
        ValueError: no columns, or embeddings of another width than the pipeline's.
    """
    width = embedding_width(pipeline)
    if not columns:
        raise ValueError("there is no column of embeddings to draw")
    for name, z in {**columns, "real": real}.items():
        if z.ndim != 2 or z.shape[1] != width:
            raise ValueError(
                f"this pipeline draws {width}-dimensional embeddings and {name!r} is {tuple(z.shape)}; translate into "
                "the CLIP it was trained with (ViT-L-14 with pretrained: openai for the default one)"
            )
    scaled = {name: rescale_norm(z, real.to(z.device)) for name, z in columns.items()}
    dtype, steps = next(pipeline.decoder.parameters()).dtype, (decoder_steps, super_resolution_steps)
    pipeline.set_progress_bar_config(disable=True)

    def one(z: Tensor, row: int) -> np.ndarray:
        drawn = pipeline(
            image_embeddings=z[row][None].to(device=pipeline.device, dtype=dtype),
            generator=torch.Generator(device=pipeline.device).manual_seed(seed + row),  # schedulers draw at every step
            decoder_num_inference_steps=steps[0],
            super_res_num_inference_steps=steps[1],
            decoder_guidance_scale=GUIDANCE,
            output_type="np",
        )
        image: np.ndarray = np.asarray(drawn.images[0], dtype=np.float32).clip(0, 1)
        return image

    places = with_progress(range(len(real)), "drawing embeddings", enabled=progress)
    rows = [{name: one(z, row) for name, z in scaled.items()} for row in places]
    return {name: np.stack([row[name] for row in rows]) for name in columns}


def choose_shown(plan: PairPlan, labels: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """Return (image, source, target) of at most `count` images: each source's first, towards targets in turn.

    Shape: labels (N,) of the split's images; sources and targets are places in the plan.
    """
    found: list[tuple[int, int, int]] = []
    for source, label in enumerate(plan.source_labels.tolist()):
        targets = plan.wanted[source].nonzero().flatten().tolist()
        mine = np.flatnonzero(plan.chosen & (labels == label))
        if targets and len(mine) and len(found) < count:
            found.append((int(mine[0]), source, targets[len(found) % len(targets)]))
    return found


def draw_steered(
    pipeline: Any,
    setup: Setup,
    plan: PairPlan,
    path: Path,
    *,
    null_space: NullSpace,
    attacker: LinearTranslator,
    judge: LinearTranslator,
    image_score: float,
    count: int = 6,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Steer a few test images and draw each beside its embedding and the judge's T(f), T(f~) and T(steered f).

    Args:
        path: of the sheet, a PNG; not written where no image can reach `image_score` (degrees).

    Returns:
        For each image index, image, source, target and step (ε / |f|, None where it is out of reach).
    """
    split, like = setup.splits.test, plan.texts.double()
    chosen = choose_shown(plan, np.asarray(split.labels), count)
    places = [image for image, _, _ in chosen]
    images = [split.image(place).convert("RGB") for place in places]
    with torch.no_grad():
        pixels = torch.stack([setup.classifier.transform(image) for image in images]).to(like.device)
        f = setup.classifier.eval().features(pixels).to(like)
        text = like[[target for _, _, target in chosen]]
        steered = steer(f, text, null_space=null_space, image_score=image_score, **steering_arguments(attacker, f))
        columns = {"CLIP": torch.from_numpy(np.array(setup.embeddings["test"][places])).to(like)}
        columns |= {"T(f)": judge(f), "T(f~)": judge(null_space.remove(f)), "steered": judge(steered.features)}
        steps, ok = (steered.step / torch.linalg.vector_norm(f, dim=-1)).tolist(), steered.reachable
    shown = [
        {
            "index": index,
            "image": split.identifier(index),
            "source": plan.sources[source],
            "target": plan.targets[target],
            "step": step if reached else None,
        }
        for (index, source, target), step, reached in zip(chosen, steps, ok.tolist(), strict=True)
    ]
    if bool(ok.any()):
        real = columns["CLIP"][ok]
        drawn = render(pipeline, {name: z[ok] for name, z in columns.items()}, real, seed=seed)
        kept = [place for place, reached in enumerate(ok.tolist()) if reached]
        squares = [np.asarray(ImageOps.fit(images[place], (SIDE, SIDE)), np.float32) / 255 for place in kept]
        captions = [f"{shown[place]['source']} → {shown[place]['target']}" for place in kept]
        draw_sheet({"image": np.stack(squares), **drawn}, captions, path)
    return shown
