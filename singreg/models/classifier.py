"""A timm (or any torch) classifier seen as features f and a linear head (METHOD sections 1 and 5)."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torchvision.transforms import Compose, RandomHorizontalFlip

from singreg.files import sha256_of_tensor
from singreg.models.heads import apply_head, as_features, effective_weight, find_head
from singreg.models.tuning import BatchNormMode, Tuning, set_modes, set_trainable

Transform = Callable[[Image.Image], Tensor]


class Classifier(nn.Module):
    """A model whose last linear layer is known: `features(x)` is the input of exactly that layer.

    Make one with `from_timm` or `from_module`. Shapes: images (B, 3, H, W), features (B, m), logits (B, C), weight (C, m).

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

    @classmethod
    def from_timm(
        cls,
        name: str,
        *,
        pretrained: bool = True,
        head_mode: Literal["keep", "slice", "new"] = "keep",
        class_indices: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
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
            image_size: side in pixels of the input, if not the pretrained model's own.

        Raises:
            ValueError: no head or several heads, or indices outside the head's rows.
        """
        if head_mode == "new" and num_classes is None:
            raise ValueError('head_mode="new" needs num_classes')
        if head_mode == "keep" and num_classes is not None:
            model_kwargs["num_classes"] = num_classes
        model: Any = timm.create_model(name, pretrained=pretrained, cache_dir=cache_dir, **model_kwargs)
        if image_size is not None and _fixed_size(model) not in (None, image_size):
            model = timm.create_model(name, pretrained=pretrained, cache_dir=cache_dir, img_size=image_size, **model_kwargs)
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        if image_size is not None:
            config["input_size"] = (config["input_size"][0], image_size, image_size)
        if head_mode == "new":
            model.reset_classifier(num_classes)
        head_name, _ = find_head(model, model.pretrained_cfg.get("classifier"))
        cfg = model.pretrained_cfg
        tag = ".".join(part for part in (cfg.get("architecture", name), cfg.get("tag")) if part)
        classifier = cls(model, head_name, tag=tag, data_config=config)
        if head_mode == "slice":
            classifier._slice_head(_rows_by_name(cfg, class_names, tag) if class_indices is None else class_indices)
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

    def _slice_head(self, class_indices: Sequence[int]) -> None:
        weight, bias = self.head.weight, self.head.bias
        assert isinstance(weight, Tensor)
        index = torch.tensor(list(class_indices), dtype=torch.long)
        if not len(index) or int(index.min()) < 0 or int(index.max()) >= len(weight):
            raise ValueError(f"class_indices must be in 0..{len(weight) - 1} for this head, got {sorted(set(class_indices))}")
        # timm's own way of changing the number of classes keeps everything that is saved with the model consistent.
        self.model.reset_classifier(len(index))  # type: ignore[operator]
        self.head_name, head = find_head(self.model, self.model.pretrained_cfg["classifier"])  # type: ignore[index, arg-type]
        with torch.no_grad():
            head.weight.copy_(weight[index])  # type: ignore[operator]
            if isinstance(bias, Tensor):
                head.bias.copy_(bias[index])  # type: ignore[operator]

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
        """(f (B, m), logits (B, C)) from one pass over images (B, 3, H, W), so with one dropout mask."""
        captured: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
        try:
            logits: Tensor = self.model(x)
        finally:
            handle.remove()
        if len(captured) != 1:
            raise ValueError(f"the head {self.head_name!r} was applied {len(captured)} times in one pass; expected once")
        return as_features(captured[0], self.head_name), logits

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
            return {"transform": repr(self._transform)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self._data_config.items()}

    def tune(self, mode: Tuning, *, batch_norm: BatchNormMode = "eval") -> Classifier:
        """Train the head, the last stage and head, or all; frozen parts stay in eval mode whatever `.train()` says (trap 10).

        `batch_norm="eval"` keeps the statistics of every batch norm fixed, in trained parts too. (No shapes.)
        """
        set_trainable(self.model, self.head_name, mode)
        self.batch_norm = batch_norm
        return self

    def train(self, mode: bool = True) -> Classifier:
        """Training mode for what is trained, eval mode for what is frozen (no shapes)."""
        super().train(mode)
        if mode:
            set_modes(self.model, self.batch_norm)
        return self

    def save(self, folder: str | Path) -> None:
        """Write a timm folder to the path: `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same logits.

        Written beside the old folder and renamed when whole.

        Raises:
            ValueError: the model is not timm's (save its state_dict with safetensors instead).
        """
        if self._data_config is None:
            raise ValueError(f"{self.tag} is not a timm model; save `classifier.model.state_dict()` with safetensors instead")
        folder = Path(folder)
        temporary, old = folder.with_name(f".{folder.name}-writing"), folder.with_name(f".{folder.name}-old")
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        labels = {"label_names": list(self.class_names)} if self.class_names else {}
        # safetensors wants plain memory; a copy, so that a channels-last model in use stays as it is.
        plain = copy.deepcopy(self.model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        timm.models.save_for_hf(
            plain, str(temporary), model_config=labels, safe_serialization=True, data_config=dict(self._data_config)
        )
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)


def _rows_by_name(cfg: Mapping[str, Any], class_names: Sequence[str] | None, tag: str) -> list[int]:
    """Rows of the head for class names, by the label names that came with the weights."""
    if class_names is None:
        raise ValueError('head_mode="slice" needs class_indices or class_names: the rows of the pretrained head to keep, in order')
    known = {name: row for row, name in enumerate(cfg.get("label_names") or ())}
    missing = [name for name in class_names if name not in known]
    if missing:
        has = f"its label names are {', '.join(list(known)[:6])}, ..." if known else "no label names are stored with it"
        raise ValueError(
            f"{tag} has no head row for {', '.join(missing[:6])} ({len(missing)} of {len(class_names)} classes; {has}); give "
            'class_indices, or a new head: head_mode="new" (model.head: new)'
        )
    return [known[name] for name in class_names]


def _fixed_size(model: nn.Module) -> int | None:
    """The side a model with a fixed input size was built for; None when any size goes in."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return int(cfg["input_size"][-1]) if cfg.get("fixed_input_size") else None
