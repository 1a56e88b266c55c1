"""Edits that need no training: dropping the null space (METHOD section 9 f), and averaging the weights of two models (WiSE-FT)."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from singreg.files import atomic_write
from singreg.geometry.nullspace import NullSpace
from singreg.models.classifier import Classifier

FORMAT = "singreg-null-dropped-1"


class NullDroppedClassifier(Classifier):
    """What `drop_null` returns: a classifier with one more linear layer m → r than timm's architecture has (no shapes of its own)."""

    def save(self, folder: str | Path) -> None:
        """Refuse: a timm folder cannot say that there is one layer more.

        Raises:
            ValueError: always; it names what to do instead.
        """
        raise ValueError(
            f"{self.tag} has one layer more than the architecture timm would build for {folder}, so plain timm could not load it. Save "
            "the classifier it was made from and call drop_null on that again (same logits), or write its tensors with "
            "save_weights(path) and read them back with drop_null(original).model.load_state_dict(safetensors.torch.load_file(path))"
        )

    def save_weights(self, path: str | Path) -> None:
        """Write all tensors of the model to a safetensors file at the path, atomically, with the format, tag and head's name."""
        state = {name: value.detach().cpu().contiguous().clone() for name, value in self.model.state_dict().items()}
        with atomic_write(path) as temporary:
            save_file(state, temporary, metadata={"format": FORMAT, "tag": self.tag, "head": self.head_name})


def drop_null(classifier: Classifier) -> NullDroppedClassifier:
    """The trivial defence: features f (m,) → Qᵀf (r,), the head W → W Q. Identical logits and no null space (METHOD section 9 f).

    Q is the orthonormal basis of W's row space, W = (W Q) Qᵀ. It makes steering in feature space impossible and changes nothing in
    pixels, so a trained defence must beat it there. The given classifier stays as it is; a batch norm in its head is folded in.

    Shapes: head (C, m) becomes a linear layer m → r without bias, then r → C, which is the returned classifier's head.

    Raises:
        ValueError: the head has no null space to drop.

    Example:
        >>> classifier = Classifier.from_timm("test_resnet", pretrained=False, num_classes=10)
        >>> dropped = drop_null(classifier)
        >>> classifier.feature_dim, dropped.feature_dim, dropped.head_name
        (96, 10, 'fc.1')
    """
    weight, bias = classifier.weight.detach(), classifier.bias
    basis = NullSpace.from_weight(weight).basis
    (classes, width), rank = weight.shape, basis.shape[1]
    layers: tuple[nn.Module, nn.Module]
    if isinstance(classifier.head, nn.Conv2d):
        layers = nn.Conv2d(width, rank, 1, bias=False), nn.Conv2d(rank, classes, 1, bias=bias is not None)
    else:
        layers = nn.Linear(width, rank, bias=False), nn.Linear(rank, classes, bias=bias is not None)
    trained = any(parameter.requires_grad for parameter in classifier.head.parameters())
    edited = nn.Sequential(*layers).to(weight).requires_grad_(trained)
    with torch.no_grad():
        _write(layers[0], "weight", basis.T)
        _write(layers[1], "weight", weight.to(basis) @ basis)
        if bias is not None:
            _write(layers[1], "bias", bias)
    model = copy.deepcopy(classifier.model)
    parent, _, name = classifier.head_name.rpartition(".")
    setattr(model.get_submodule(parent), name, edited)
    dropped = NullDroppedClassifier(
        model, f"{classifier.head_name}.1", tag=f"{classifier.tag}.null_dropped", data_config=classifier._data_config
    )
    dropped._transform, dropped.class_names, dropped.batch_norm = classifier._transform, classifier.class_names, classifier.batch_norm
    return dropped


def interpolate_weights(before: Classifier, after: Classifier, alpha: float) -> Classifier:
    """WiSE-FT: (1 − α) · before + α · after over all parameters and floating-point buffers; a new classifier, in eval mode.

    Counters (integer buffers) are those of `after`. At α = 0 and 1 every tensor is bit-identical to `before` and `after`.
    Wortsman et al., Robust fine-tuning of zero-shot models, 2022. (No shapes: both models have the same.)

    Raises:
        ValueError: alpha is not in [0, 1], or the two have other tensors, shapes or classes.

    Example:
        >>> a, b = (Classifier.from_timm("test_resnet", pretrained=False, num_classes=3) for _ in range(2))
        >>> middle = interpolate_weights(a, b, 0.5)
        >>> bool(((a.weight + b.weight) / 2 - middle.weight).abs().max() < 1e-6)
        True
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], from 0 (before) to 1 (after), got {alpha}")
    old, new = before.model.state_dict(), after.model.state_dict()
    _check_same(before, after, old, new)
    mixed = copy.deepcopy(before if alpha == 0 else after).eval()
    if 0 < alpha < 1:
        mixed.model.load_state_dict({name: _mix(old[name], value, alpha) for name, value in new.items()})
    return mixed


def _write(layer: nn.Module, name: str, value: Tensor) -> None:
    parameter = layer.get_parameter(name)
    parameter.copy_(value.reshape(parameter.shape))


def _mix(old: Tensor, new: Tensor, alpha: float) -> Tensor:
    """In float64, so that the two models' order does not show in the last bit; integers are the new model's. Shapes kept."""
    if not (new.is_floating_point() or new.is_complex()):
        return new
    exact = torch.promote_types(new.dtype, torch.float64)
    return ((1 - alpha) * old.to(new.device, exact) + alpha * new.to(exact)).to(new.dtype)


def _check_same(before: Classifier, after: Classifier, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """All differences that make an average meaningless, at once."""
    wrong = [f"{name} is only in {'before' if name in old else 'after'}" for name in sorted(old.keys() ^ new.keys())]
    wrong += [
        f"{name} is {tuple(old[name].shape)} before and {tuple(value.shape)} after"
        for name, value in new.items()
        if name in old and old[name].shape != value.shape
    ]
    if before.class_names and after.class_names and before.class_names != after.class_names:
        wrong.append(f"the classes are {', '.join(before.class_names[:4])}, ... before and {', '.join(after.class_names[:4])}, ... after")
    if wrong:
        raise ValueError(
            f"the weights of {before.tag} and {after.tag} cannot be averaged: {'; '.join(wrong[:6])} ({len(wrong)} differences). Take two "
            "states of one model with the same head"
        )
