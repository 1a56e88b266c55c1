"""A tiny open_clip model with random, saved weights: the real code path in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

TINY_CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def tiny_state(seed: int = 0, *, quick_gelu: bool = False) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A tiny CLIP in eval mode and its state, drawn with a seed."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**json.loads(json.dumps(TINY_CONFIG)), quick_gelu=quick_gelu).eval()
    return model, {name: value.clone().contiguous() for name, value in model.state_dict().items()}


def write_tiny_vlm(folder: Path, seed: int = 0) -> str:
    """Write an open_clip folder and return its name for `from_open_clip`."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": TINY_CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(tiny_state(seed)[1], folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"
