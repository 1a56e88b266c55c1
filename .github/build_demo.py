"""Train, from scratch, the two small models that the built-in demo ships: an open_clip model and a timm classifier.

python .github/build_demo.py          # about 15 minutes on 2 cores; writes singreg/assets, or --out FOLDER
"""

import argparse
import hashlib
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch import Tensor, nn

from singreg.data.scenes import ATTRIBUTES, SHAPES, SceneTable, render_scene, sample_scenes
from singreg.utils import atomic_write, progress, write_json

PIXELS, CONTEXT, RATE = 64, 24, 3e-3
BIAS = 0.6  # how often the background of a training scene goes with the class
NORMALIZE = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
VISION = {"timm_model_name": "test_byobnet", "timm_pool": "avg", "timm_proj": "linear", "timm_proj_bias": True}
TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
TOWERS = {"embed_dim": 64, "vision_cfg": {**VISION, "image_size": PIXELS}, "text_cfg": TEXT}
PREPROCESS = {**NORMALIZE, "interpolation": "bicubic", "resize_mode": "shortest", "size": [PIXELS, PIXELS]}
PROMPTS = {
    "shape": ("an image of a {}", "a {}", "a picture of a {}", "there is a {}"),
    "color": ("a {} shape", "something {}", "an image of a {} shape", "the colour is {}"),
    "texture": ("a {} shape", "a {} pattern", "an image of a {} shape"),
    "background": ("a shape on a background of {}", "an image with {} in the background", "a background of {}", "{}"),
    "size": ("a {} shape", "an image of a {} shape", "something {}"),
    "place": ("a shape at the {}", "something at the {} of the image", "at the {}"),
}
CAPTIONS = (
    "a {size} {color} {texture} {shape} on a background of {background} at the {place}",
    "an image of a {color} {shape} with {background} in the background",
    "a {texture} {color} {shape}",
    "a {color} {shape}",
    "a {size} {shape} at the {place}",
    "a {shape} on {background}",
)


def render(table: SceneTable) -> Tensor:
    """Render all scenes, (N, 3, 64, 64) uint8 in channels-last memory."""
    images = np.stack([render_scene(table, i) for i in progress(range(len(table)), "rendering")])
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def normalized(images: Tensor) -> Tensor:
    """Bring uint8 images (B, 3, H, W) to the models' input range."""
    return images.float() / 127.5 - 1


def contrastive_step(
    model: Any, tokenizer: Any, tokens: Any, images: Tensor, table: SceneTable, index: Tensor
) -> Tensor:
    """Return the contrastive loss of a batch: every attribute against all its values' prompts, and whole captions."""
    z = model.encode_image(normalized(images[index]), normalize=True)
    scale = model.logit_scale.exp().clamp_max(60)
    drawn = {name: random.randrange(len(prompts)) for name, prompts in PROMPTS.items()}
    words = [{name: values[int(table.codes[name][i])] for name, values in ATTRIBUTES.items()} for i in index.tolist()]
    captions = tokenizer([random.choice(CAPTIONS).format(**each) for each in words])
    text = model.encode_text(torch.cat([*(tokens[name][drawn[name]] for name in PROMPTS), captions]), normalize=True)
    loss, start = torch.zeros(()), 0
    for name, values in ATTRIBUTES.items():
        logits = scale * z @ text[start : start + len(values)].T
        loss = loss + nn.functional.cross_entropy(logits, torch.from_numpy(table.codes[name])[index])
        start += len(values)
    logits = scale * z @ text[start:].T
    own = torch.arange(len(index))
    return loss + 0.25 * (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own))


def train(model: nn.Module, step: Callable[[Tensor], Tensor], count: int, epochs: int, batch: int) -> None:
    """Train by AdamW with a one-cycle schedule; `step(index)` gives the loss of the scenes at `index` (B,)."""
    decayed, flat = ([p for p in model.parameters() if (p.ndim > 1) == many] for many in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    steps = epochs * (count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.15)
    for epoch in range(epochs):
        model.train()
        order = torch.split(torch.randperm(count)[: count // batch * batch], batch)
        for index in progress(order, f"epoch {epoch + 1}/{epochs}"):
            loss = step(index)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def build_vlm(out: Path) -> None:
    """Train the vision-language model and write its folder."""
    set_seed(0)
    model: Any = open_clip.CustomTextCLIP(**TOWERS).to(memory_format=torch.channels_last)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    table = sample_scenes(32000, seed=1)
    images = render(table)
    tokens = {
        name: [tokenizer([prompt.format(value) for value in ATTRIBUTES[name]]) for prompt in prompts]
        for name, prompts in PROMPTS.items()
    }
    step = partial(contrastive_step, model, tokenizer, tokens, images, table)
    train(model, step, len(table), epochs=8, batch=128)
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    # The token table is almost the whole file; float16 halves it and changes nothing that can be measured.
    state["text.token_embedding.weight"] = state["text.token_embedding.weight"].half()
    with atomic_write(out / "open_clip_model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    config = {"model_cfg": {**TOWERS, "custom_text": True}, "preprocess_cfg": PREPROCESS}
    write_json(out / "open_clip_config.json", config)


def build_classifier(out: Path) -> None:
    """Train the shape classifier on scenes whose background goes with the class and write it."""
    set_seed(0)
    overlay = {"input_size": (3, PIXELS, PIXELS), "pool_size": (2, 2), "crop_pct": 1.0, "num_classes": len(SHAPES)}
    overlay |= {**NORMALIZE, "tag": "singreg_scenes"}
    model: Any = timm.create_model("test_efficientnet", num_classes=len(SHAPES), pretrained_cfg_overlay=overlay)
    model = model.to(memory_format=torch.channels_last)
    table = sample_scenes(5000, seed=3, background_bias=BIAS)
    images, labels = render(table), torch.from_numpy(table.codes["shape"])

    def step(index: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(normalized(images[index])), labels[index])

    train(model, step, len(table), epochs=6, batch=64)
    model = model.eval().to(memory_format=torch.contiguous_format)
    timm.models.save_for_hf(model, str(out), model_config={"label_names": list(SHAPES)}, safe_serialization=True)


def main() -> None:
    """Build both and write how, with hashes, to provenance.json beside them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "singreg" / "assets")
    out, start = parser.parse_args().out, time.monotonic()
    build_classifier(out / "demo_classifier")
    build_vlm(out / "demo_vlm")
    files = sorted(path for kind in ("demo_vlm", "demo_classifier") for path in (out / kind).iterdir())
    hashes = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    facts = {"command": "python .github/build_demo.py", "seconds": round(time.monotonic() - start)}
    write_json(out / "provenance.json", facts | {"torch": torch.__version__, "sha256": hashes})


if __name__ == "__main__":
    main()
