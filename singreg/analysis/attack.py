"""Gradient ascent on 8-bit images that turns what a translator reads while the logits stay (METHOD section 9)."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import wait_for_everyone
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.functional import to_tensor

from singreg.analysis.features import process_share
from singreg.data.splits import ImageSplit
from singreg.models.classifier import Classifier
from singreg.models.edits import NullDroppedClassifier
from singreg.translator import Translator
from singreg.utils import atomic_write, progress, rank_and_world

LEVELS = 255
TANGENT, LAGRANGIAN, SIGNED = "tangent passes", "Lagrangian passes", "signed Lagrangian passes"
MARGIN = 0.999  # of every constraint: another batch size moves a logit in its last bits
MOMENTUM = 0.9
PENALTY, GROWTH = 0.02, 1.03
PATH = {TANGENT: 2.0, LAGRANGIAN: 4.0, SIGNED: 4.0}  # radii that all steps of a pass make together
TIGHTER = 0.1  # of the tolerance; aiming inside it leaves more of the last steps feasible
MOST_HELD = 64  # gradients a tangent takes; 1,000 classes would take 1,000
RENEWED = 2  # steps that one Jacobian serves: k backward passes are the cost of it
DAMPING = 1e-6  # of the mean of diag(JJᵀ): two held quantities may have the same gradient
HALVINGS = 6  # of the single step's length
ATTACK, RANDOM = "attack", "random"


@dataclass(frozen=True)
class Reading:
    """What an attacker reads of images."""

    value: Tensor  # (B,) the objective
    held: Tensor  # (B, k) signed distances from where something was, over their tolerance; each must stay in [-1, 1]
    bounds: Tensor  # (B, j), each must stay at most 1

    @property
    def constraints(self) -> Tensor:
        """All of them, (B, k + j), each holding where it is at most 1."""
        return torch.cat([self.held.abs(), self.bounds], dim=1)


Judged = Callable[[Tensor], Reading]
"""From images (B, 3, H, W) in [0, 1] to what an attacker reads of them."""


@dataclass
class Best:
    """The best feasible images so far and their objective (B,) in float64; at first the originals."""

    images: Tensor
    value: Tensor

    def offer(self, images: Tensor, reading: Reading) -> None:
        """Keep what is feasible, with the margin, and better than the best so far."""
        feasible = (reading.constraints.detach() <= MARGIN).all(1)
        self.keep(images, torch.where(feasible, reading.value.detach().double(), -torch.inf))

    def keep(self, images: Tensor, values: Tensor) -> None:
        """Keep what is better (B,) than the best so far."""
        better = values > self.value
        self.value = torch.where(better, values, self.value)
        self.images = torch.where(better[:, None, None, None], images, self.images)


@dataclass(frozen=True)
class Tangent:
    """Directions that move none of the held quantities, to first order: I - Jᵀ(JJᵀ)⁻¹J over the free pixels."""

    jacobian: Tensor  # J (B, k, P), gradients of the held quantities by pixel
    free: Tensor  # (B, P), 1 where a pixel may move, 0 where it may not

    @classmethod
    def of(cls, held: Tensor, images: Tensor) -> "Tangent":
        """Take J by one backward pass for each of the held (B, k); the graph is kept."""
        rows = [torch.autograd.grad(column.sum(), images, retain_graph=True)[0].flatten(1) for column in held.unbind(1)]
        jacobian = torch.stack(rows, dim=1)
        return cls(jacobian, torch.ones_like(jacobian[:, 0]))

    def within(self, moved: Tensor, gradient: Tensor, low: Tensor, high: Tensor) -> "Tangent":
        """Hold the pixels still that are at an edge and pushed over it; all (B, 3, H, W)."""
        slack = 1e-6
        stuck = ((moved >= high - slack) & (gradient > 0)) | ((moved <= low + slack) & (gradient < 0))
        return Tangent(self.jacobian, (~stuck).flatten(1).to(self.jacobian))

    def along(self, direction: Tensor) -> Tensor:
        """Return what of a direction (B, 3, H, W) moves free pixels only and none of the held."""
        flat = direction.flatten(1) * self.free
        return (flat - self._lift((self.jacobian @ flat[:, :, None])[:, :, 0])).view_as(direction)

    def back(self, held: Tensor, like: Tensor) -> Tensor:
        """Return the smallest displacement of free pixels that takes the held (B, k) back to 0 (Gauss-Newton)."""
        return -self._lift(held).view_as(like)

    def _lift(self, held: Tensor) -> Tensor:
        """Jᵀ(JJᵀ)⁻¹ held, (B, P)."""
        open_rows = self.jacobian * self.free[:, None]
        gram = (open_rows @ self.jacobian.transpose(1, 2)).double()
        scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        gram = gram + DAMPING * scale[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        solved = torch.linalg.solve(gram, held.double()[:, :, None]).to(open_rows)
        return (solved * open_rows).sum(1)


def on_grid(x: Tensor, moved: Tensor, size: int) -> Tensor:
    """Round x + moved (B, 3, H, W) to 8-bit values in [0, 1] at most `size` levels away; x lies on the grid itself."""
    levels = (LEVELS * moved).round().clamp(-size, size)
    return ((LEVELS * x).round() + levels).clamp(0, LEVELS) / LEVELS


def random_images(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Move every pixel of images (B, 3, H, W) by `size` levels up or down at random, held to nothing else."""
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    return on_grid(x, size / LEVELS * noise.sign(), size)


def _unit_mean(direction: Tensor) -> Tensor:
    """Scale it so that pixels move by 1 on average."""
    return direction / direction.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-30)


def ascend(
    judged: Judged, x: Tensor, size: int, start: Tensor | None, *, steps: int, restarts: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Maximise the objective within L-infinity `size` / 255 while all constraints hold; a search, no optimum.

    Every reading is of an image that an 8-bit file can hold. A step of a level or two already breaks a constraint, so
    passes go along the tangent of what is held, the pixel counterpart of the null space, and take turns with an
    augmented Lagrangian. Where more than 64 things are held it stands alone, along the gradient, which keeps tight
    constraints, and along its sign, which fills the budget. The first pass starts from the better of the single step
    and `start`, each further one from random points.

    Shape: x and start (B, 3, H, W) in [0, 1] on the 8-bit grid.

    Returns:
        The best images, and objectives (B,): before, one_step, began (before any pass), and by kind of pass what its
        own steps reached, their start not counted: a dead pass cannot hide behind what it began from.
    """
    free = x.detach().clone().requires_grad_()
    reading = judged(free)
    before, kinds = reading.value.detach().double(), (TANGENT, LAGRANGIAN)
    tangent = Tangent.of(reading.held, free) if reading.held.shape[1] <= MOST_HELD else None
    (gradient,) = torch.autograd.grad(reading.value.sum(), free)
    direction, best = gradient.sign(), Best(x, before)
    if tangent is None:
        kinds = (LAGRANGIAN, SIGNED)
    else:
        direction = _unit_mean(tangent.along(gradient))
    with torch.no_grad():
        for halving in range(HALVINGS + 1):  # of the single step the best feasible length
            images = on_grid(x, size / LEVELS * direction * 0.5**halving, size)
            best.offer(images, judged(images))
        found = {"before": before, "one_step": best.value}
        if start is not None:
            best.offer(start, judged(start))
    found["began"] = best.value
    for restart in range(restarts):
        kind = kinds[restart % 2]
        moved = best.images - x
        if restart:
            noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device) * 2 - 1
            moved = size / LEVELS * noise / 2
        own = climb(judged, x, moved, size, Best(x, before), steps=steps, kind=kind)
        found[kind] = torch.maximum(found.get(kind, own.value), own.value)
        best.keep(own.images, own.value)
    return best.images, found


def climb(judged: Judged, x: Tensor, moved: Tensor, size: int, best: Best, *, steps: int, kind: str) -> Best:
    """Ascend from x + moved, and return `best` with what the steps found; the start itself is not offered.

    The Lagrangian takes constraints c ≤ 1 as -(ρ/2) Σ relu(c - 1 + λ/ρ)², with λ ← relu(λ + ρ (c - 1)) and ρ growing
    for images that still break one.
    """
    radius, speed, tangent = size / LEVELS, torch.zeros_like(x), None
    low, high = (-x).clamp_min(-radius), (1 - x).clamp_max(radius)
    weight = torch.full((len(x), 1), PENALTY, dtype=x.dtype, device=x.device)
    multipliers = torch.zeros_like(weight)
    for step in range(steps + 1):
        rounded = on_grid(x, moved, size)
        free = (x + moved).detach().requires_grad_()
        reading = judged(free + (rounded - free).detach())
        if step:
            best.offer(rounded, reading)
        if step == steps:
            break
        length = PATH[kind] / steps * (1 + float(np.cos(np.pi * step / steps)))
        if kind == TANGENT:
            if tangent is None or step % RENEWED == 0:
                tangent = Tangent.of(reading.held, free)
            (gradient,) = torch.autograd.grad(reading.value.sum(), free)
            open_to = tangent.within(moved, gradient, low, high)
            open_to = open_to.within(moved, open_to.along(gradient), low, high)
            speed = open_to.along(MOMENTUM * speed + _unit_mean(open_to.along(gradient)))
            moved = moved + length * (radius * _unit_mean(speed)) + open_to.back(reading.held.detach(), x)
        else:
            excess = reading.constraints - (1 - TIGHTER)
            lagrangian = reading.value - (weight / 2 * (excess + multipliers / weight).relu().square()).sum(1)
            (gradient,) = torch.autograd.grad(lagrangian.sum(), free)
            multipliers = (multipliers + weight * excess.detach()).relu()
            weight = torch.where((excess.detach() > 0).any(1, keepdim=True), GROWTH * weight, weight)
            speed = MOMENTUM * speed + _unit_mean(gradient)
            moved = moved + length * (radius * (speed.sign() if kind == SIGNED else _unit_mean(speed)))
        moved = moved.clamp(-radius, radius)
        moved = (x + moved).clamp(0, 1) - x
    return best


class PixelModel:
    """A classifier behind its normalisation, as a function of images in [0, 1] at its input size.

    Of a classifier whose null space was dropped the features are those before the dropping, which a white-box attacker
    reads just as well.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier, self.device = copy.copy(classifier), classifier.weight.device
        if isinstance(classifier, NullDroppedClassifier):
            self.classifier.head_name = classifier.head_name.rpartition(".")[0]
        mean, std = (torch.tensor(classifier.preprocessing[name], device=self.device) for name in ("mean", "std"))
        self.mean, self.std = mean[:, None, None], std[:, None, None]
        self.size = classifier.preprocessing["input_size"]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, m) and logits (B, C) of images (B, 3, H, W), differentiable."""
        seen = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.classifier.features_and_logits(seen)

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
    return torch.stack([to_tensor(Image.open(path)) for path in paths])


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
