"""The images of an attack: which ones, how a classifier reads them, what is wanted of them, their files."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import wait_for_everyone
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.attack import LEVELS, Judged, Reading, ascend, random_images
from singreg.analysis.features import process_share
from singreg.data.splits import ImageSplit
from singreg.models.classifier import Classifier
from singreg.models.edits import NullDroppedClassifier
from singreg.translator import Translator
from singreg.utils import atomic_write, progress, rank_and_world

ATTACK, RANDOM = "attack", "random"


class PixelModel:
    """A classifier behind its normalisation, as a function of images in [0, 1] at its input size.

    Of a classifier whose null space was dropped the features are those before the dropping, which a white-box attacker
    reads just as well.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier, self.device = classifier, classifier.weight.device
        mean, std = (torch.tensor(classifier.preprocessing[name], device=self.device) for name in ("mean", "std"))
        self.mean, self.std = mean[:, None, None], std[:, None, None]
        self.size = classifier.preprocessing["input_size"]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, m) and logits (B, C) of images (B, 3, H, W), differentiable."""
        seen = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if not isinstance(self.classifier, NullDroppedClassifier):
            return self.classifier.features_and_logits(seen)
        captured: list[Tensor] = []
        whole_head = self.classifier.model.get_submodule(self.classifier.head_name.rpartition(".")[0])
        handle = whole_head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
        try:
            logits = self.classifier(seen)
        finally:
            handle.remove()
        return captured[0].flatten(1), logits

    def image(self, split: ImageSplit, index: int) -> Tensor:
        """Return an image as the classifier's transform resizes and cuts it, (3, H, W) on the 8-bit grid in [0, 1]."""
        seen = self.classifier.transform(split.image(index)).to(self.mean)
        return (LEVELS * (seen * self.std + self.mean)).round().clamp(0, LEVELS) / LEVELS


def save_images(images: Tensor, folder: Path, inside: str, indices: Iterable[int]) -> list[str]:
    """Write images (B, 3, H, W) on the 8-bit grid as PNG, each whole or not at all; their paths inside the folder."""
    paths = [f"{inside}/{index:06d}.png" for index in indices]
    for values, path in zip((LEVELS * images).round().byte().permute(0, 2, 3, 1).cpu().numpy(), paths, strict=True):
        with atomic_write(folder / path) as temporary:
            Image.fromarray(values).save(temporary, format="png")
    return paths


def load_images(paths: Sequence[Path]) -> Tensor:
    """Read PNG files of one size as (B, 3, H, W) in [0, 1]: to-tensor and nothing else."""
    rows = [np.asarray(Image.open(path), dtype=np.float32) / LEVELS for path in paths]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def choose_images(split: ImageSplit, count: int, seed: int) -> pd.DataFrame:
    """Choose at most `count` labelled images evenly over classes, and for each a target class, one row an image."""
    rng = np.random.default_rng([seed, 7])
    order = rng.permutation(np.flatnonzero(split.labels >= 0))
    labels = pd.Series(split.labels[order])
    if labels.nunique() < 2:
        raise ValueError("expected labelled test images of at least two classes; an image is steered towards another")
    kept = order[np.lexsort((labels, labels.groupby(labels).cumcount()))][:count]
    classes, labels = range(len(split.class_names)), split.labels[kept]
    targets = [int(rng.choice([target for target in classes if target != label])) for label in labels]
    identifiers = [split.identifier(int(index)) for index in kept]
    rows = {"image": kept, "identifier": identifiers, "label": labels, "target": targets}
    return pd.DataFrame(rows)


def towards_prompt(model: PixelModel, translator: Translator, x: Tensor, target: Tensor, tau: float) -> Judged:
    """Maximise cos(T(f), t) to unit rows `target` (B, n), while x's logits stay within τ and its decision stays."""
    with torch.no_grad():
        _, logits = model(x)
    decision = logits.argmax(1, keepdim=True)

    def judged(images: Tensor) -> Reading:
        features, now = model(images)
        gain = (normalize(translator(features), dim=-1) * target).sum(1)
        rivals = now.scatter(1, decision, -torch.inf).amax(1, keepdim=True)
        stays = 1 + (rivals - now.gather(1, decision)) / tau
        return Reading(gain, (now - logits) / tau, stays)

    return judged


def attack_images(
    judged: Judged, x: Tensor, linf: Sequence[int], seed: Sequence[int], **how: Any
) -> Iterator[tuple[int, dict[str, Tensor], pd.DataFrame]]:
    """Attack a batch at every budget (255ths, rising), a larger one starting from what the smaller found.

    Yields:
        The budget, its images by arm, and the degrees gained (see `ascend`, which takes `how`), a row an image.
    """
    best = None
    for place, size in enumerate(linf):
        drawn = np.random.SeedSequence([*seed, place + 3]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(drawn))
        best, values = ascend(judged, x, size, best, generator=generator, **how)
        degrees = {name: torch.rad2deg(value.clamp(-1, 1).arccos()).cpu() for name, value in values.items()}
        before = degrees.pop("before")
        gained = pd.DataFrame({name: (before - after).numpy() for name, after in degrees.items()})
        yield size, {ATTACK: best, RANDOM: random_images(x, size, generator)}, gained


def attack_split(
    model: PixelModel,
    translator: Translator,
    split: ImageSplit,
    chosen: pd.DataFrame,
    texts: Tensor,
    folder: Path,
    name: str,
    *,
    tau: float,
    seed: int,
    batch_size: int,
    **how: Any,
) -> pd.DataFrame:
    """Attack chosen images; originals and attacks become PNG files in attacked/NAME, finished batches are read there.

    Args:
        how: linf of `attack_images`, steps and restarts of `ascend`.

    Returns:
        One row an attacked image: those of `chosen`, original and file (paths inside `folder`), size (255ths), budget,
        arm, and for attacks the degrees gained.
    """
    batches = [chosen.iloc[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    done = [folder / "attacked" / name / f"batch-{number:04d}.parquet" for number in range(len(batches))]
    for number in progress(process_share(len(done)), f"attacking {name}", enabled=rank_and_world()[0] == 0):
        if done[number].is_file():
            continue
        some = batches[number].reset_index(drop=True)
        x = torch.stack([model.image(split, index) for index in some["image"]])
        some["original"] = save_images(x, folder, f"attacked/{name}/original", some["image"])
        judged, frames = towards_prompt(model, translator, x, texts[some["target"].tolist()], tau), []
        for size, arms, gained in attack_images(judged, x, seed=(seed, number), **how):
            for arm, images in arms.items():
                files = save_images(images, folder, f"attacked/{name}/linf-{size}-{LEVELS}/{arm}", some["image"])
                rows = some.assign(file=files, size=size, budget=f"linf {size}/{LEVELS}", arm=arm)
                frames.append(rows.join(gained) if arm == ATTACK else rows)
        with atomic_write(done[number]) as temporary:
            pd.concat(frames).to_parquet(temporary)
    wait_for_everyone()
    return pd.concat([pd.read_parquet(path) for path in done], ignore_index=True)
