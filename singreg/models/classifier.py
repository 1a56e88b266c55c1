"""A timm (or any torch) classifier seen as features f and a linear head (METHOD sections 1 and 5)."""

import copy
import difflib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torchvision.transforms import Compose, RandomHorizontalFlip

from singreg.classes import head_rows, subset_of
from singreg.models import heads
from singreg.utils import sha256_of_tensor

HeadMode = Literal["keep", "slice", "new"]
Tuning = Literal["head", "last_stage", "all"]
Transform = Callable[[Image.Image], Tensor]


class Classifier(nn.Module):
    """A model whose last linear layer is known: `features(x)` is the input of exactly that layer.

    Make one with `from_timm` or `from_module`; it comes in eval mode, so call `.train()` before training.

    Example:
        >>> classifier = Classifier.from_timm("test_resnet", pretrained=False, num_classes=10)
        >>> f, logits = classifier.features_and_logits(torch.randn(2, 3, 64, 64))
        >>> f.shape, logits.shape, classifier.head_name
        (torch.Size([2, 96]), torch.Size([2, 10]), 'fc')
    """

    own_transform: Transform | None = None
    class_names: tuple[str, ...] | None = None
    new_head = False

    def __init__(
        self, model: nn.Module, head_name: str, *, tag: str, data_config: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.model, self.head_name, self.tag, self.data_config = model, head_name, tag, data_config
        self.eval()  # timm's models come in train mode, in which a first look at the features would move batch norms
        heads.check_is_affine(self.head, head_name)

    @classmethod
    def from_timm(
        cls,
        name: str,
        *,
        pretrained: bool = True,
        head_mode: HeadMode = "keep",
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        image_size: int | None = None,
        **model_kwargs: Any,
    ) -> "Classifier":
        """Make one of any timm name, `local-dir:FOLDER` or `hf-hub:USER/MODEL`; its pretrained_cfg names the head.

        Args:
            head_mode: "keep" all C rows; "slice" those of `class_names` (see `classes.head_rows`; rows by number
                are taken with `slice_head`); "new" draws a fresh head of `num_classes`.
            class_names: names of a sliced or new head's rows.
            num_classes: rows of a "new" head, or of an untrained model.
            image_size: side of the input in pixels, if not the model's own; `model_kwargs` are timm's.
        """
        needed = {"keep": True, "slice": class_names and not num_classes, "new": num_classes}.get(head_mode)
        if not needed:
            wanted = '"keep", "slice" with class_names or "new" with num_classes'
            raise ValueError(f"head_mode is {wanted}, got {head_mode!r}")
        if head_mode == "keep" and num_classes is not None:
            model_kwargs["num_classes"] = num_classes
        model = _create(name, pretrained=pretrained, **model_kwargs)
        cfg = model.pretrained_cfg
        if image_size and cfg.get("fixed_input_size") and image_size != cfg["input_size"][-1]:
            model = _create(name, pretrained=pretrained, img_size=image_size, **model_kwargs)
        tag = ".".join(part for part in (cfg.get("architecture", name), cfg.get("tag")) if part)
        if pretrained and head_mode == "keep" and num_classes not in (None, cfg["num_classes"]):
            had = f"{tag} was trained with {cfg['num_classes']} classes, so a head of {num_classes} cannot be kept"
            raise ValueError(f'{had}; use head_mode="new" for a fresh one or "slice" for some of its rows')
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        if image_size is not None:
            config["input_size"] = (config["input_size"][0], image_size, image_size)
        if head_mode == "new":
            model.reset_classifier(num_classes)
            model.pretrained_cfg = {**cfg, "label_names": None, "label_descriptions": None}  # of rows that are gone
        classifier = cls(model, heads.find_head(model, cfg.get("classifier"))[0], tag=tag, data_config=config)
        classifier.new_head = head_mode == "new"
        if head_mode == "slice":
            chosen = subset_of(tuple(class_names or ()))
            classifier.slice_head(head_rows(chosen, classifier.label_names, classifier.num_classes))
        if head_mode != "keep" and class_names is not None:
            if len(class_names) != classifier.num_classes:
                raise ValueError(f"{len(class_names)} class_names for {classifier.num_classes} rows of the head")
            classifier.class_names = tuple(class_names)
        return classifier

    @classmethod
    def from_module(
        cls, model: nn.Module, head: str = "fc", *, transform: Transform | None = None, tag: str | None = None
    ) -> "Classifier":
        """Make one of any torch model whose submodule `head` is (or ends in) its last linear layer.

        `transform` turns a PIL image into a tensor (3, H, W); `tag` is the name in reports.
        """
        classifier = cls(model, heads.find_head(model, head)[0], tag=tag or type(model).__name__)
        classifier.own_transform = transform
        return classifier

    def slice_head(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the head, in this order, in place."""
        classes, repeated = self.num_classes, [row for row, count in Counter(rows).items() if count > 1]
        wrong = repeated or [row for row in rows if not 0 <= row < classes]
        if wrong or not rows:
            got = f"{len(rows)} with {wrong[:6]}{' repeated' if repeated else ''}"
            raise ValueError(f"expected different rows in 0..{classes - 1} of {self.tag}, got {got}")
        linear = (heads.batch_norm_and_linear(self.head) or (None, self.head))[1]
        name = next(name for name, module in self.model.named_modules() if module is linear)
        index = torch.tensor(list(rows), device=self.weight.device)
        state = self.model.state_dict()
        state |= {key: state[key][index] for key in (f"{name}.weight", f"{name}.bias") if key in state}
        # Some families draw their whole head anew here (caformer's MLP), so every other tensor is put back.
        self.model.reset_classifier(len(rows))  # type: ignore[operator]
        self.model.load_state_dict(state)
        labels = self.label_names
        self.class_names = tuple(labels[row] for row in rows) if all(row in labels for row in rows) else None
        self.eval()

    @property
    def label_names(self) -> dict[int, str]:
        """Names stored with the weights, by row of the pretrained head: timm keeps a list, or a mapping with gaps."""
        names = getattr(self.model, "pretrained_cfg", {}).get("label_names") or ()
        return {int(row): name for row, name in (names.items() if isinstance(names, Mapping) else enumerate(names))}

    @property
    def head(self) -> nn.Module:
        return self.model.get_submodule(self.head_name)

    @property
    def weight(self) -> Tensor:
        """W, (C, m): effective (a 1x1 convolution flattened, a batch norm folded in) and differentiable."""
        return heads.effective_weight(self.head)[0]

    @property
    def bias(self) -> Tensor | None:
        """b, (C,), or None."""
        return heads.effective_weight(self.head)[1]

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    @property
    def feature_dim(self) -> int:
        """m, the width of the head's input; timm's num_features is another one in some families."""
        return self.weight.shape[1]

    def head_hash(self) -> str:
        """Return the SHA-256 of W as float32."""
        return sha256_of_tensor(self.weight)

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return f (B, m) and logits (B, C) from one pass over images (B, 3, H, W), so with one dropout mask."""
        captured: list[tuple[Tensor, Tensor]] = []
        handle = self.head.register_forward_hook(lambda _, inputs, output: captured.append((inputs[0], output)))
        try:
            logits = self.model(x)
        finally:
            handle.remove()
        if len(captured) != 1:
            raise ValueError(f"the head {self.head_name!r} was applied {len(captured)} times in one pass, not once")
        return heads.check_pass(*captured[0], logits, self.head_name)

    def features(self, x: Tensor) -> Tensor:
        """Return f (B, m), the input of the head, of images (B, 3, H, W)."""
        return self.features_and_logits(x)[0]

    def logits(self, features: Tensor) -> Tensor:
        """Return the head's output (B, C) for features (B, m)."""
        return heads.apply_head(self.head, features)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, 3, H, W)."""
        return self.model(x)

    @property
    def transform(self) -> Transform:
        """The model's own evaluation transform, PIL to (3, H, W)."""
        if self.own_transform is None:
            if self.data_config is None:
                raise ValueError(f"{self.tag} was made of a module without a transform; pass transform= to from_module")
            self.own_transform = create_transform(**self.data_config, is_training=False)
        return self.own_transform

    def train_transform(self, augmentation: Literal["none", "flip", "timm"] = "none") -> Transform:
        """Return the transform of training images: the evaluation one, mirrored or not, or timm's training one."""
        if augmentation != "timm":
            return Compose([RandomHorizontalFlip(), self.transform]) if augmentation == "flip" else self.transform
        if self.data_config is None:
            raise ValueError("timm's training augmentation needs a timm model; use none or flip")
        options: Any = {"is_training": True, "auto_augment": "rand-m7-mstd0.5", "re_prob": 0.1}
        return create_transform(**self.data_config, **options)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the evaluation transform does, as JSON-able values (sizes in pixels)."""
        if self.data_config is None:
            return {"transform": None if self.own_transform is None else _hash_of_result(self.own_transform)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self.data_config.items()}

    def tune(self, mode: Tuning) -> "Classifier":
        """Choose what trains: the "head", the "last_stage" and what follows it (a transformer's last block), or "all".

        The rest stays in eval mode whatever `.train()` says, and so do batch norms: they keep their statistics.
        """
        if mode not in get_args(Tuning):
            raise ValueError(f"tuning must be one of {get_args(Tuning)}, got {mode!r}")
        head = {name for name, _ in self.model.named_parameters() if name.startswith(f"{self.head_name}.")}
        trained = head | heads.last_stage(self.model, head) if mode == "last_stage" else head
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(mode == "all" or name in trained)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if mode:
            heads.set_modes(self.model)
        return self

    def save(self, folder: str | Path) -> None:
        """Write a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`, whole or not at all."""
        if self.data_config is None:
            raise ValueError(f"{self.tag} is not a timm model; save `classifier.model.state_dict()` with safetensors")
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        labels = {"label_names": list(self.class_names)} if self.class_names else {}
        # safetensors wants plain memory and nothing shared (coat ties modules), so copies are written.
        state = {name: value.detach().cpu().contiguous().clone() for name, value in self.model.state_dict().items()}
        plain = copy.copy(self.model)
        plain.state_dict = lambda: state  # type: ignore[method-assign, assignment]
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-writing-", dir=folder.parent) as temporary:
            new, old = Path(temporary) / "new", Path(temporary) / "old"
            config: dict[str, Any] = {"data_config": dict(self.data_config)}
            timm.models.save_for_hf(plain, str(new), model_config=labels, safe_serialization=True, **config)
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)


def _create(name: str, **arguments: Any) -> Any:
    """timm's model; a ValueError names what timm does not know, or the folder that does not hold a model."""
    architecture = name.partition(".")[0]
    if ":" not in name and not timm.is_model(architecture):
        if "/" in name:
            raise ValueError(f"there is no folder {name}, and timm has no model of that name")
        near = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), n=3)) or "none with a name like it"
        raise ValueError(f"timm has no model {name!r}; near are: {near}")
    if not name.startswith("local-dir:"):
        return timm.create_model(name, **arguments)
    try:
        return timm.create_model(f"local-dir:{Path(name.removeprefix('local-dir:')).expanduser()}", **arguments)
    except Exception as error:
        raise ValueError(f"no model could be loaded from {name}: {error or type(error).__name__}") from error


def _hash_of_result(transform: Transform) -> str:
    """Of what it makes of one image, so that two lambdas differ."""
    y, x = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    image = Image.fromarray(torch.stack([4 * x, 5 * y, 2 * (x + y)], dim=-1).to(torch.uint8).numpy())
    return sha256_of_tensor(transform(image))
