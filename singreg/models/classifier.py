"""A timm (or any torch) classifier seen as features f and a linear head (METHOD sections 1 and 5)."""

from __future__ import annotations

import copy
import difflib
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torchvision.transforms import Compose, RandomHorizontalFlip

from singreg.models.heads import (
    apply_head,
    as_features,
    batch_norm_and_linear,
    check_is_affine,
    check_is_output,
    effective_weight,
    find_head,
)
from singreg.models.tuning import BatchNormMode, Tuning, set_modes, set_trainable
from singreg.old_seals import check_folder, seal_folder
from singreg.utils import sha256_of_tensor

IMAGENET_CLASSES = 1000
Transform = Callable[[Image.Image], Tensor]
_UNLOADABLE = (
    SafetensorError, UnpicklingError, EOFError, AssertionError, RuntimeError, OSError, LookupError, TypeError, ValueError, MemoryError,
    AttributeError,
)  # fmt: skip


class Classifier(nn.Module):
    """A model whose last linear layer is known: `features(x)` is the input of exactly that layer.

    Make one with `from_timm` or `from_module`; it comes in eval mode, so call `.train()` before training.
    Shapes: images (B, 3, H, W), features (B, m), logits (B, C), weight (C, m).

    Example:
        >>> classifier = Classifier.from_timm("test_resnet", pretrained=False, num_classes=10)
        >>> f, logits = classifier.features_and_logits(torch.randn(2, 3, 64, 64))
        >>> f.shape, logits.shape, classifier.head_name
        (torch.Size([2, 96]), torch.Size([2, 10]), 'fc')
    """

    def __init__(self, model: nn.Module, head_name: str, *, tag: str, data_config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.head_name = head_name
        self.tag = tag
        self.class_names: tuple[str, ...] | None = None
        self.batch_norm: BatchNormMode = "eval"
        self._data_config = data_config
        self._transform: Transform | None = None
        self.eval()  # timm's models come in train mode, in which a first look at the features would move batch norms
        check_is_affine(self.head, head_name)

    @classmethod
    def from_timm(
        cls,
        name: str,
        *,
        pretrained: bool = True,
        head_mode: Literal["keep", "slice", "new"] = "keep",
        class_indices: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        imagenet_rows: bool = False,
        num_classes: int | None = None,
        image_size: int | None = None,
        cache_dir: str | None = None,
        **model_kwargs: Any,
    ) -> Classifier:
        """Any timm name, `local-dir:FOLDER` or `hf-hub:USER/MODEL`; the head is what its pretrained_cfg names.

        Args:
            head_mode: "keep" all C rows; "slice": only the rows `class_indices` of the pretrained head, in that order (without
                indices, the rows of `class_names` among the label names stored with the weights); "new": a freshly
                initialised head of `num_classes` rows.
            imagenet_rows: `class_indices` are places among ImageNet-1k's classes. Label names stored with the weights go first;
                without them the head must have 1000 rows.
            image_size: side in pixels of the input, if not the pretrained model's own.

        Raises:
            ValueError: no head or several heads, rows the head does not have, or arguments that do not go with the head mode.
        """
        _check_arguments(head_mode, class_indices, class_names, num_classes)
        if head_mode == "keep" and num_classes is not None:
            model_kwargs["num_classes"] = num_classes
        model = _create(name, pretrained=pretrained, cache_dir=cache_dir, **model_kwargs)
        if image_size is not None and _fixed_size(model) not in (None, image_size):
            model = _create(name, pretrained=pretrained, cache_dir=cache_dir, img_size=image_size, **model_kwargs)
        cfg = model.pretrained_cfg
        tag = ".".join(part for part in (cfg.get("architecture", name), cfg.get("tag")) if part)
        if pretrained and head_mode == "keep" and num_classes not in (None, cfg["num_classes"]):
            raise ValueError(
                f"{tag} was trained with {cfg['num_classes']} classes, so a head of {num_classes} cannot be kept; use "
                'head_mode="new" for a fresh one or "slice" for some of its rows'
            )
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        if image_size is not None:
            config["input_size"] = (config["input_size"][0], image_size, image_size)
        if head_mode == "new":
            model.reset_classifier(num_classes)
            model.pretrained_cfg = {**cfg, "label_names": None, "label_descriptions": None}  # of rows that are gone
        head_name, _ = find_head(model, cfg.get("classifier"))
        classifier = cls(model, head_name, tag=tag, data_config=config)
        if head_mode == "slice":
            labels = _label_names(cfg)
            rows = _rows_to_keep(labels, class_indices, class_names or (), imagenet_rows, classifier)
            classifier._slice_head(rows)
            if class_names is None and all(row in labels for row in rows):
                class_names = [labels[row] for row in rows]
        if head_mode != "keep" and class_names is not None:
            classifier.class_names = tuple(class_names)
        return classifier

    @classmethod
    def from_module(
        cls, model: nn.Module, head: str = "fc", *, transform: Transform | None = None, tag: str | None = None
    ) -> Classifier:
        """Any torch model whose submodule `head` is (or ends in) its last linear layer; `transform` takes PIL to (3, H, W).

        Example:
            >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2))
            >>> Classifier.from_module(net, head="3").features(torch.ones(1, 3, 2, 2)).shape
            torch.Size([1, 6])
        """
        name, _ = find_head(model, head)
        classifier = cls(model, name, tag=tag or type(model).__name__)
        classifier._transform = transform
        return classifier

    def _slice_head(self, rows: Sequence[int]) -> None:
        classes, repeated = self.num_classes, [row for row, count in Counter(rows).items() if count > 1]
        if not rows or min(rows) < 0 or max(rows) >= classes or repeated:
            wrong = repeated or [row for row in rows if not 0 <= row < classes]
            raise ValueError(
                f"class_indices must be different rows in 0..{classes - 1} of the head of {self.tag}, got {len(rows)} with {wrong[:6]}"
                f"{' repeated' if repeated else ''}"
            )
        pair = batch_norm_and_linear(self.head)
        linear = self.head if pair is None else pair[1]
        name = next(name for name, module in self.model.named_modules() if module is linear)
        index = torch.tensor(list(rows), device=self.weight.device)
        state = self.model.state_dict()
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in state:
                state[key] = state[key][index]
        # timm's own way of changing the number of classes keeps what is saved with the model consistent; but some families draw
        # their whole head anew in it (caformer's MLP), so every other tensor is put back.
        self.model.reset_classifier(len(rows))  # type: ignore[operator]
        self.model.load_state_dict(state)
        self.eval()

    @property
    def head(self) -> nn.Module:
        """The head module itself."""
        return self.model.get_submodule(self.head_name)

    @property
    def weight(self) -> Tensor:
        """W, (C, m): effective (a 1x1 convolution flattened, a batch norm folded in) and differentiable."""
        return effective_weight(self.head)[0]

    @property
    def bias(self) -> Tensor | None:
        """b, (C,), or None."""
        return effective_weight(self.head)[1]

    @property
    def num_classes(self) -> int:
        """C, the rows of the head."""
        return self.weight.shape[0]

    @property
    def feature_dim(self) -> int:
        """m, the width of the head's input (not timm's num_features, which some families give before another layer)."""
        return self.weight.shape[1]

    def head_hash(self) -> str:
        """SHA-256 of W as float32 (C, m)."""
        return sha256_of_tensor(self.weight)

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(f (B, m), logits (B, C)) from one pass over images (B, 3, H, W), so with one dropout mask.

        Raises:
            ValueError: the head is applied several times, to several places, or its output is not what the model returns.
        """
        captured: list[tuple[Tensor, Tensor]] = []
        handle = self.head.register_forward_hook(lambda _, inputs, output: captured.append((inputs[0], output)))
        try:
            logits = self.model(x)
        finally:
            handle.remove()
        if len(captured) != 1:
            raise ValueError(f"the head {self.head_name!r} was applied {len(captured)} times in one pass; expected once")
        features, output = captured[0]
        return as_features(features, self.head_name), check_is_output(output, logits, self.head_name)

    def features(self, x: Tensor) -> Tensor:
        """f, the input of the head. Shapes: images (B, 3, H, W) to (B, m)."""
        return self.features_and_logits(x)[0]

    def logits(self, features: Tensor) -> Tensor:
        """The head alone. Shapes: (B, m) to (B, C)."""
        return apply_head(self.head, features)

    def forward(self, x: Tensor) -> Tensor:
        """Logits. Shapes: images (B, 3, H, W) to (B, C)."""
        logits: Tensor = self.model(x)
        return logits

    @property
    def transform(self) -> Transform:
        """The model's own evaluation transform, PIL to (3, H, W)."""
        if self._transform is None:
            if self._data_config is None:
                raise ValueError(f"{self.tag} was made from a plain module without a transform; pass transform= to from_module")
            self._transform = create_transform(**self._data_config, is_training=False)
        return self._transform

    def train_transform(self, augmentation: Literal["none", "flip", "timm"] = "none") -> Transform:
        """What training pictures go through, PIL to (3, H, W): the evaluation transform, mirrored or not, or timm's training one."""
        if augmentation == "timm":
            if self._data_config is None:
                raise ValueError("timm's training augmentation needs a timm model; use none or flip")
            transform: Transform = create_transform(
                **self._data_config, is_training=True, auto_augment="rand-m7-mstd0.5", re_prob=0.1
            )
            return transform
        return Compose([RandomHorizontalFlip(), self.transform]) if augmentation == "flip" else self.transform

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the evaluation transform does, as JSON-able values (sizes in pixels)."""
        if self._data_config is None:
            return {"transform": None if self._transform is None else _describe_transform(self._transform)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self._data_config.items()}

    def tune(self, mode: Tuning, *, batch_norm: BatchNormMode = "eval") -> Classifier:
        """Train the head, the last stage and what follows it (a vision transformer's last block), or all.

        Frozen parts stay in eval mode whatever `.train()` says, or a frozen backbone's batch norms would move all the same.

        `batch_norm="eval"` keeps the statistics of every batch norm fixed, in trained parts too. (No shapes.)
        """
        set_trainable(self.model, self.head_name, mode)
        self.batch_norm = batch_norm
        return self.train(self.training)

    def train(self, mode: bool = True) -> Classifier:
        """Training mode for what is trained, eval mode for what is frozen (no shapes)."""
        super().train(mode)
        if mode:
            set_modes(self.model, self.batch_norm)
        return self

    def save(self, folder: str | Path) -> None:
        """Write a timm folder to the path: `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same logits.

        Written beside the old folder and renamed when whole: what was there stays if the writing fails.

        Raises:
            ValueError: the model is not timm's (save its state_dict with safetensors instead), or its head is constrained.
        """
        if self._data_config is None:
            raise ValueError(f"{self.tag} is not a timm model; save `classifier.model.state_dict()` with safetensors instead")
        if is_parametrized(self.head):
            raise ValueError(f"the head of {self.tag} is constrained, which plain timm cannot load; call release_rows(classifier) first")
        folder = Path(folder)
        temporary, old = folder.with_name(f".{folder.name}-writing"), folder.with_name(f".{folder.name}-old")
        if old.exists() and not folder.exists():  # a run was killed between the two renames below
            os.replace(old, folder)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        labels = {"label_names": list(self.class_names)} if self.class_names else {}
        # safetensors wants plain memory and nothing shared (coat ties modules): copies, so the model in use stays as it is.
        state = {name: value.detach().cpu().contiguous().clone() for name, value in self.model.state_dict().items()}
        plain = copy.copy(self.model)
        plain.state_dict = lambda: state  # type: ignore[assignment, method-assign, misc]
        try:
            timm.models.save_for_hf(
                plain, str(temporary), model_config=labels, safe_serialization=True, data_config=dict(self._data_config)
            )
            seal_folder(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)


def _create(name: str, **arguments: Any) -> Any:
    """timm's model; a ValueError names what timm does not know, or the file or folder that does not hold what was written."""
    if not name.startswith("local-dir:"):
        architecture = name.partition(".")[0]
        if ":" not in name and not timm.is_model(architecture):
            near = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), n=3)) or "none with a name like it"
            raise ValueError(f"timm has no model {name!r}; near are: {near}")
        return timm.create_model(name, **arguments)
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    check_folder(folder)
    try:
        return timm.create_model(name, **arguments)
    except _UNLOADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"no model could be loaded from {folder}: {reason[:400]}") from error


def _describe_transform(transform: Transform) -> str:
    """Its text without memory addresses, and a hash of what it makes of one picture, so that lambdas differ: equal in every run."""
    y, x = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    picture = Image.fromarray(torch.stack([4 * x, 5 * y, 2 * (x + y)], dim=-1).to(torch.uint8).numpy())
    return f"{re.sub(r' at 0x[0-9a-f]+', '', repr(transform))} {sha256_of_tensor(transform(picture))}"


def _check_arguments(
    head_mode: str, class_indices: Sequence[int] | None, class_names: Sequence[str] | None, num_classes: int | None
) -> None:
    """All that is wrong with from_timm's arguments, at once."""
    wrong = []
    if head_mode not in ("keep", "slice", "new"):
        wrong.append(f'head_mode must be "keep", "slice" or "new", got {head_mode!r}')
    if head_mode == "new" and num_classes is None:
        wrong.append('head_mode="new" needs num_classes')
    if head_mode == "slice" and num_classes is not None:
        wrong.append(f"head_mode=\"slice\" takes class_indices or class_names, not num_classes ({num_classes})")
    if head_mode == "slice" and class_indices is None and class_names is None:
        wrong.append('head_mode="slice" needs class_indices or class_names: the rows of the pretrained head to keep, in order')
    if head_mode in ("keep", "new") and class_indices is not None:
        wrong.append(f'class_indices go with head_mode="slice", not {head_mode!r}')
    rows = num_classes if class_indices is None else len(class_indices)
    if head_mode in ("slice", "new") and class_names is not None and rows not in (None, len(class_names)):
        wrong.append(f"{len(class_names)} class_names for {rows} rows of the head")
    if wrong:
        raise ValueError("; ".join(wrong))


def _label_names(cfg: Mapping[str, Any]) -> dict[int, str]:
    """Label names stored with the weights, by row of the head: timm keeps a list, or a mapping where rows have gaps."""
    names = cfg.get("label_names") or ()
    return {int(row): name for row, name in (names.items() if isinstance(names, Mapping) else enumerate(names))}


def _rows_to_keep(
    labels: Mapping[int, str], indices: Sequence[int] | None, class_names: Sequence[str], imagenet_rows: bool, classifier: Classifier
) -> list[int]:
    """Rows of a head that is sliced: those given, or those whose stored label names are the classes'."""
    if indices is None or (imagenet_rows and class_names and set(class_names) <= set(labels.values())):
        return _rows_by_name(labels, class_names, classifier.tag)
    if imagenet_rows and classifier.num_classes != IMAGENET_CLASSES:
        known = f"other class names ({', '.join(list(labels.values())[:4])}, ...)" if labels else "no class names"
        raise ValueError(
            f"the head of {classifier.tag} has {classifier.num_classes} rows and {known}, so ImageNet rows cannot be taken from it: set "
            "model.head: keep (rows in the data's class order), store label_names, or model.head: new"
        )
    return list(indices)


def _rows_by_name(labels: Mapping[int, str], class_names: Sequence[str], tag: str) -> list[int]:
    """Rows of the head for class names, by the label names that came with the weights."""
    known: dict[str, list[int]] = {}
    for row, name in labels.items():
        known.setdefault(name, []).append(row)
    missing = [name for name in class_names if name not in known]
    if missing:
        has = f"its label names are {', '.join(list(known)[:6])}, ..." if known else "no label names are stored with it"
        raise ValueError(
            f"{tag} has no head row for {', '.join(missing[:6])} ({len(missing)} of {len(class_names)} classes; {has}); give "
            'class_indices, or a new head: head_mode="new" (model.head: new)'
        )
    several = [f"{name} (rows {known[name]})" for name in class_names if len(known[name]) > 1]
    if several:
        raise ValueError(f"{tag} has several head rows of the same name: {', '.join(several[:6])}; give class_indices")
    return [known[name][0] for name in class_names]


def _fixed_size(model: nn.Module) -> int | None:
    """The side a model with a fixed input size was built for; None when any size goes in."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return int(cfg["input_size"][-1]) if cfg.get("fixed_input_size") else None
