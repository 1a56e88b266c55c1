"""A classifier's parts: its head (Linear, 1x1 convolution, batch norm + linear, end of an MLP) and its last stage."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import group_parameters
from torch import Tensor, nn


class HeadError(ValueError):
    """A model without one linear head of its own, so without a null space to speak of."""


def is_linear(module: nn.Module) -> bool:
    """Return True for a Linear or a 1x1 convolution without groups."""
    if isinstance(module, nn.Conv2d):
        one_place = module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding in ((0, 0), "valid")
        return one_place and module.groups == 1
    return isinstance(module, nn.Linear)


def find_head(model: nn.Module, name: str | Sequence[str] | None) -> tuple[str, nn.Module]:
    """Return name and module of the head: what `name` points to, or the last linear layer within it.

    A container of batch norm (+ dropout) + linear is returned whole, to be folded.
    """
    kind = type(model).__name__
    if not name:
        raise HeadError(f'{kind} names no classifier; use Classifier.from_module(model, head="NAME of its last layer")')
    if not isinstance(name, str):
        how = f'wrap it to return the logits of one: Classifier.from_module(wrapper, head="model.{name[0]}")'
        heads = f"{len(name)} heads ({', '.join(name)})"
        raise HeadError(f"{kind} combines the logits of {heads}; use one without distillation, or {how}")
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        known = [n for n, m in model.named_modules() if is_linear(m)][-3:]
        raise HeadError(f"{kind} has no module {name!r}; its last linear layers are {known}") from error
    if is_linear(module) or batch_norm_and_linear(module) is not None or hasattr(module, "base_layer"):
        return name, module
    inner = [(n, m) for n, m in module.named_modules() if is_linear(m)]
    if not inner:
        held = f"{type(module).__name__} and holds no linear layer (made with num_classes=0?)"
        raise HeadError(f"the head {name!r} of {kind} is {held}; pass num_classes, or head_mode='new'")
    return f"{name}.{inner[-1][0]}", inner[-1][1]


def batch_norm_and_linear(module: nn.Module) -> tuple[nn.BatchNorm1d, nn.Linear] | None:
    """Return the two layers of a head that is a batch norm, perhaps a dropout, and a linear layer; else None."""
    layers = [child for child in module.children() if not isinstance(child, (nn.Dropout, nn.Identity))]
    if len(layers) == 2 and isinstance(layers[0], nn.BatchNorm1d) and isinstance(layers[1], nn.Linear):
        return layers[0], layers[1]
    return None


def effective_weight(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return W (C, m) and b (C,) or None of the map a head is in eval mode; differentiable, batch norm folded in."""
    if hasattr(head, "base_layer"):  # as all of PEFT's layers have it: .weight is the base's, without the adapter
        said = f"the head {type(head).__name__} computes more than its .weight says (an adapter)"
        raise HeadError(f"{said}; merge the adapter into the head, or leave the head out of target_modules")
    pair = batch_norm_and_linear(head)
    if pair is None:
        weight, bias = head.weight, head.bias
        assert isinstance(weight, Tensor)
        return weight.flatten(1), bias if isinstance(bias, Tensor) else None
    norm, linear = pair
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("the head's batch norm keeps no running statistics, so it cannot be folded")
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale + (norm.bias if norm.bias is not None else 0.0)
    bias = linear.weight @ shift + (linear.bias if linear.bias is not None else 0.0)
    return linear.weight * scale, bias


def apply_head(head: nn.Module, features: Tensor) -> Tensor:
    """Return logits (B, C) of features (B, m) through the head module itself."""
    return head(features[:, :, None, None]).flatten(1) if isinstance(head, nn.Conv2d) else head(features)


def check_is_affine(head: nn.Module, name: str) -> None:
    """Raise a ValueError for a head that is not f Wᵀ + b in eval mode, such as a normalised (cosine) linear layer."""
    weight, bias = effective_weight(head)
    if weight.is_meta:
        return
    with torch.no_grad():
        probe = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).reshape(2, -1)
        # On the CPU: not every device has float64.
        exact, wide = probe.cpu().double(), weight.cpu().double()
        offset = torch.zeros(len(wide)).double() if bias is None else bias.cpu().double()
        scale = (exact.abs() @ wide.abs().T + offset.abs()).max()
        error = (apply_head(head, probe).cpu().double() - (exact @ wide.T + offset)).abs().max()
    if error > torch.finfo(weight.dtype).eps ** 0.5 * scale:
        raise ValueError(f"the head {name!r} ({type(head).__name__}) does not compute f W^T + b; name a linear layer")


def check_pass(features: Tensor, output: Tensor, logits: object, name: str) -> tuple[Tensor, Tensor]:
    """Return the head's input as (B, m) and the model's logits (B, C); a ValueError unless the head made the logits."""
    if features.ndim > 2 and features.shape[2:].numel() == 1:
        features = features.flatten(1)
    if features.ndim != 2:
        got = f"got {tuple(features.shape)}; use an architecture that pools before its last linear layer"
        raise ValueError(f"expected an input (B, m) or (B, m, 1, 1) of the head {name!r}, {got}")
    if not isinstance(logits, Tensor):
        raise ValueError(f"expected logits (B, C), got {type(logits).__name__}; wrap the model to return them")
    flat = output.flatten(1)
    if flat.shape != logits.shape or not (
        flat.data_ptr() == logits.data_ptr() or torch.allclose(flat.to(logits), logits, rtol=0, atol=0, equal_nan=True)
    ):
        got = f"output {tuple(logits.shape)} is not that of its head {name!r} {tuple(output.shape)}"
        raise ValueError(f"the model's {got} (a softmax, a scale?). Wrap the model to return the head's output alone")
    return features, logits


def last_stage(model: nn.Module, head: set[str]) -> set[str]:
    """Return the parameter names of the last stage and everything after it, by timm's own grouping into layers."""
    try:
        matcher = model.group_matcher(coarse=True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError) as error:  # the last two are rdnet's way
        raise ValueError(f"{type(model).__name__} does not say its stages; use tuning head or all") from error
    groups: dict[int, list[str]] = group_parameters(model, matcher)
    layers = [number for number, names in sorted(groups.items()) if any(name not in head for name in names)]
    # A group of a norm alone, after the last stage, belongs to that stage.
    sizes = {n: sum(model.get_parameter(each).numel() for each in groups[n] if each not in head) for n in layers}
    last = next((number for number in reversed(layers) if sizes[number] > 0.01 * sum(sizes.values())), 0)
    # So does what timm groups apart but comes after the last feature map: mobilenetv3's conv_head, an MLP.
    features: Any = getattr(model, "feature_info", None) or [{"module": ""}]
    stage = f"{features[-1]['module']}."
    last = min([last, *[number for number in layers if any(name.startswith(stage) for name in groups[number])][-1:]])
    return {name for number in layers if number >= last for name in groups[number]}


def set_modes(module: nn.Module) -> None:
    """Put parts without a trained parameter in eval mode, and all that keep running statistics, as batch norms do."""
    parameters = list(module.parameters())
    frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
    if frozen or getattr(module, "running_var", None) is not None:
        module.eval()
        return
    for child in module.children():
        set_modes(child)
