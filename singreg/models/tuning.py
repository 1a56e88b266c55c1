"""Which parts of a classifier train, and how the others are kept from moving."""

from __future__ import annotations

from typing import Literal

from torch import nn

Tuning = Literal["head", "last_stage", "all"]
BatchNormMode = Literal["eval", "train"]


def set_trainable(model: nn.Module, head_name: str, mode: Tuning) -> None:
    """Set requires_grad of every parameter (no shapes): of the head, of the last stage and what follows it, or of all.

    Raises:
        ValueError: an unknown mode, or "last_stage" for a model that does not say what its stages are.
    """
    if mode not in ("head", "last_stage", "all"):
        raise ValueError(f'tuning must be "head", "last_stage" or "all", got {mode!r}')
    trained = {name for name, _ in model.named_parameters() if name.startswith(f"{head_name}.")}
    if mode == "all":
        trained = {name for name, _ in model.named_parameters()}
    elif mode == "last_stage":
        trained |= _last_stage(model, trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def _last_stage(model: nn.Module, head: set[str]) -> set[str]:
    """Parameter names of the last stage and everything after it, by timm's own grouping into layers."""
    if not hasattr(model, "group_matcher"):
        raise ValueError(
            f"{type(model).__name__} does not say what its stages are (timm's group_matcher); use tuning head or all"
        )
    from timm.models import group_parameters

    groups: dict[int, list[str]] = group_parameters(model, model.group_matcher(coarse=True))  # type: ignore[operator]
    layers = [number for number, names in sorted(groups.items()) if any(name not in head for name in names)]
    # A group of a norm alone, after the last stage, belongs to that stage.
    sizes = {number: sum(model.get_parameter(n).numel() for n in groups[number] if n not in head) for number in layers}
    last = next(number for number in reversed(layers) if sizes[number] > 0.01 * sum(sizes.values()))
    return {name for number in layers if number >= last for name in groups[number]}


def set_modes(module: nn.Module, batch_norm: BatchNormMode) -> None:
    """Put parts without a trained parameter in eval mode, and every batch norm when `batch_norm` is "eval" (no shapes)."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    if batch_norm == "eval" and isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.eval()
    for child in module.children():
        set_modes(child, batch_norm)
