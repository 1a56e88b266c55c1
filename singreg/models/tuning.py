"""Which parts of a classifier train, and how the others are kept from moving."""

from __future__ import annotations

from typing import Any, Literal

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
    from timm.models import group_parameters

    unknown = ValueError(f"{type(model).__name__} does not say what its stages are (timm's group_matcher); use tuning head or all")
    if not hasattr(model, "group_matcher"):
        raise unknown
    try:
        matcher = model.group_matcher(coarse=True)  # type: ignore[operator]
    except (AssertionError, NotImplementedError) as error:  # rdnet's way of having no stages
        raise unknown from error
    groups: dict[int, list[str]] = group_parameters(model, matcher)
    layers = [number for number, names in sorted(groups.items()) if any(name not in head for name in names)]
    # A group of a norm alone, after the last stage, belongs to that stage.
    sizes = {number: sum(model.get_parameter(n).numel() for n in groups[number] if n not in head) for number in layers}
    last = next((number for number in reversed(layers) if sizes[number] > 0.01 * sum(sizes.values())), 0)
    # So does what timm groups apart but comes after the last feature map: mobilenetv3's conv_head, an MLP before the head.
    features: Any = getattr(model, "feature_info", None) or [{"module": ""}]
    stage = f"{features[-1]['module']}."
    last = min([last, *[number for number in layers if any(name.startswith(stage) for name in groups[number])][-1:]])
    return {name for number in layers if number >= last for name in groups[number]}


def set_modes(module: nn.Module, batch_norm: BatchNormMode) -> None:
    """Put parts without a trained parameter in eval mode, and every batch norm when `batch_norm` is "eval" (no shapes).

    A batch norm without parameters of its own trains only where everything beside it does.
    """
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    whole = all(parameter.requires_grad for parameter in parameters)
    for child in module.children():
        is_norm = getattr(child, "running_var", None) is not None  # batch norm, and what else keeps running statistics
        if is_norm and (batch_norm == "eval" or (not whole and not list(child.parameters()))):
            child.eval()
        else:
            set_modes(child, batch_norm)
