"""Train, from scratch, the two small models that the built-in demo ships: an open_clip model and a timm classifier.

python recipes/build_demo.py                      # about 15 minutes on 2 cores; writes singreg/assets
python recipes/build_demo.py --out /tmp/demo      # elsewhere
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch import Tensor, nn

from singreg.data.scenes import ATTRIBUTES, SHAPES, SceneTable, render_scene, sample_scenes
from singreg.utils import atomic_write, progress, sha256_of_file, write_json, write_text

PIXELS, CONTEXT = 64, 24
NORMALIZE = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
VLM_CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {
            "timm_model_name": "test_byobnet", "timm_pool": "avg", "timm_proj": "linear", "timm_proj_bias": True,
            "image_size": PIXELS,
        },
        "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
        "custom_text": True,
    },
    "preprocess_cfg": {**NORMALIZE, "interpolation": "bicubic", "resize_mode": "shortest", "size": [PIXELS, PIXELS]},
}  # fmt: skip
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


def pictures(table: SceneTable) -> Tensor:
    """All scenes rendered, (N, 3, 64, 64) uint8 in channels-last memory."""
    images = np.stack([render_scene(table, i, PIXELS) for i in progress(range(len(table)), "rendering")])
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def normalized(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to the models' input range."""
    return images.float() / 127.5 - 1


def accuracy(model: nn.Module, tokenizer: open_clip.SimpleTokenizer, images: Tensor, table: SceneTable) -> dict[str, float]:
    """Zero-shot accuracy of every attribute from its first prompt, shares in [0, 1]."""
    model.eval()
    with torch.no_grad():
        z = torch.cat([model.encode_image(normalized(chunk), normalize=True) for chunk in images.split(256)])
        result = {}
        for name, values in ATTRIBUTES.items():
            text = model.encode_text(tokenizer([PROMPTS[name][0].format(value) for value in values]), normalize=True)
            result[name] = float(((z @ text.T).argmax(1).numpy() == table.codes[name]).mean())
    return result


def contrastive_step(
    model: nn.Module, tokenizer: open_clip.SimpleTokenizer, tokens: dict[str, list[Tensor]], images: Tensor, table: SceneTable,
    index: Tensor,
) -> Tensor:  # fmt: skip
    """Contrastive loss of a batch: every attribute against all its values' prompts, and whole captions both ways."""
    z = model.encode_image(normalized(images[index]), normalize=True)
    scale = model.logit_scale.exp().clamp_max(60)
    drawn = {name: random.randrange(len(prompts)) for name, prompts in PROMPTS.items()}
    captions = tokenizer([random.choice(CAPTIONS).format(**table.names(int(i))) for i in index])
    text = model.encode_text(torch.cat([*(tokens[name][drawn[name]] for name in PROMPTS), captions]), normalize=True)
    loss, start = torch.zeros(()), 0
    for name, values in ATTRIBUTES.items():
        logits = scale * z @ text[start : start + len(values)].T
        loss = loss + nn.functional.cross_entropy(logits, torch.from_numpy(table.codes[name])[index])
        start += len(values)
    logits = scale * z @ text[start:].T
    own = torch.arange(len(index))
    return loss + 0.25 * (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own))


def train(
    model: nn.Module, step: Callable[[Tensor], Tensor], count: int, *, epochs: int, batch: int, rate: float, name: str
) -> None:
    """AdamW with a one-cycle schedule; `step(index)` gives the loss of the scenes at `index` (B,)."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    flat = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.02}, {"params": flat, "weight_decay": 0.0}], lr=rate)
    total = epochs * (count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total, pct_start=0.15)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(count)[: count // batch * batch].split(batch)
        losses = []
        for index in progress(order, f"{name} {epoch + 1}/{epochs}"):
            loss = step(index)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(float(loss.detach()))
        print(f"{name} epoch {epoch + 1}: loss {np.mean(losses):.3f}", flush=True)


def build_vlm(out: Path, seed: int, scenes: int, epochs: int) -> dict[str, float]:
    """Train the vision-language model, write its folder, and return zero-shot accuracies on fresh scenes."""
    set_seed(seed)
    model = open_clip.CustomTextCLIP(**{k: v for k, v in VLM_CONFIG["model_cfg"].items() if k != "custom_text"})
    model = model.to(memory_format=torch.channels_last)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    table = sample_scenes(scenes, seed=seed + 1)
    images = pictures(table)
    tokens = {
        name: [tokenizer([prompt.format(value) for value in ATTRIBUTES[name]]) for prompt in prompts]
        for name, prompts in PROMPTS.items()
    }
    train(
        model, lambda index: contrastive_step(model, tokenizer, tokens, images, table, index), scenes,
        epochs=epochs, batch=128, rate=3e-3, name="vision-language model",
    )  # fmt: skip
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    # The token table is almost the whole file; float16 halves it and changes nothing that can be measured.
    state["text.token_embedding.weight"] = state["text.token_embedding.weight"].half()
    with atomic_write(out / "open_clip_model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    write_json(out / "open_clip_config.json", VLM_CONFIG)
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    fresh = sample_scenes(2000, seed=seed + 2)
    return accuracy(loaded, tokenizer, pictures(fresh), fresh)


def build_classifier(out: Path, seed: int, scenes: int, epochs: int, bias: float) -> dict[str, float]:
    """Train the shape classifier on scenes whose background goes with the class, write a timm folder, return accuracies."""
    set_seed(seed)
    overlay = {"input_size": (3, PIXELS, PIXELS), "pool_size": (2, 2), "crop_pct": 1.0, "num_classes": len(SHAPES), **NORMALIZE}
    model = timm.create_model(
        "test_efficientnet", pretrained=False, num_classes=len(SHAPES), pretrained_cfg_overlay={**overlay, "tag": "singreg_scenes"}
    ).to(memory_format=torch.channels_last)
    table = sample_scenes(scenes, seed=seed + 3, background_bias=bias)
    images, labels = pictures(table), torch.from_numpy(table.codes["shape"])
    train(
        model, lambda index: nn.functional.cross_entropy(model(normalized(images[index])), labels[index]), scenes,
        epochs=epochs, batch=64, rate=3e-3, name="classifier",
    )  # fmt: skip
    model = model.eval().to(memory_format=torch.contiguous_format)
    timm.models.save_for_hf(model, out, model_config={"label_names": list(SHAPES)}, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    result = {}
    for name, share in {"top1_unbiased": 0.0, "top1_biased": bias}.items():
        fresh = sample_scenes(2000, seed=seed + 4, background_bias=share)
        with torch.no_grad():
            logits = torch.cat([loaded(normalized(chunk)) for chunk in pictures(fresh).split(256)])
        result[name] = float((logits.argmax(1).numpy() == fresh.codes["shape"]).mean())
    return result


def write_provenance(out: Path, arguments: argparse.Namespace, accuracies: dict[str, dict[str, float]], seconds: float) -> None:
    """provenance.json and README.md beside the models: command, seed, hashes, accuracies."""
    files = sorted(path for kind in ("demo_vlm", "demo_classifier") for path in (out / kind).iterdir())
    options = {name: value for name, value in vars(arguments).items() if name != "out"}
    command = "python recipes/build_demo.py " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in options.items())
    facts = {
        "command": command,
        "seconds": round(seconds),
        "torch": torch.__version__,
        "accuracy": accuracies,
        "sha256": {str(path.relative_to(out)): sha256_of_file(path) for path in files},
    }
    write_json(out / "provenance.json", facts)
    lines = [
        "# The built-in demo's models\n",
        "`demo_vlm` is an open_clip model, `demo_classifier` a timm model; both were trained from scratch on the built-in scenes by\n",
        f"    {command}\n",
        "Accuracies on 2,000 fresh scenes (zero-shot from prompts for the first; the class is the shape):\n",
        "| | |\n|---|---|",
        *[f"| {kind}, {name} | {value:.1%} |" for kind, values in accuracies.items() for name, value in values.items()],
        "\n`provenance.json` holds the hashes. Licence: that of singreg.\n",
    ]
    write_text(out / "README.md", "\n".join(lines))


def main() -> None:
    """Build both and record how."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "singreg" / "assets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vlm-scenes", type=int, default=32000)
    parser.add_argument("--vlm-epochs", type=int, default=8)
    parser.add_argument("--classifier-scenes", type=int, default=5000)
    parser.add_argument("--classifier-epochs", type=int, default=6)
    parser.add_argument("--background-bias", type=float, default=0.6)
    arguments = parser.parse_args()
    start = time.monotonic()
    accuracies = {
        "classifier": build_classifier(
            arguments.out / "demo_classifier",
            arguments.seed, arguments.classifier_scenes, arguments.classifier_epochs, arguments.background_bias,
        ),
        "vlm": build_vlm(arguments.out / "demo_vlm", arguments.seed, arguments.vlm_scenes, arguments.vlm_epochs),
    }  # fmt: skip
    write_provenance(arguments.out, arguments, accuracies, time.monotonic() - start)
    print(json.dumps(accuracies, indent=1))


if __name__ == "__main__":
    main()
