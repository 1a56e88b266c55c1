"""Finding a classifier's last linear layer: a Linear, a 1x1 convolution, batch norm + linear, or the last layer of an MLP head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class HeadError(ValueError):
    """A model without one linear head of its own, so without a null space to speak of."""


def is_linear(module: nn.Module) -> bool:
    """True for a Linear or a 1x1 convolution without groups: weight (C, m) or (C, m, 1, 1)."""
    if isinstance(module, nn.Conv2d):
        one_place = module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding in ((0, 0), "valid")
        return one_place and module.groups == 1
    return isinstance(module, nn.Linear)


def find_head(model: nn.Module, name: str | Sequence[str] | None) -> tuple[str, nn.Module]:
    """The module whose input is the feature f, and its name inside the model: what `name` points to, or the layer within it.

    A container of batch norm (+ dropout) + linear is returned whole, to be folded; of any other container the last linear
    layer is returned. Weight shapes (C, m) or (C, m, 1, 1).

    Raises:
        HeadError: no head, several heads, or no linear layer under that name.

    Example:
        >>> find_head(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "1")
        ('1', Linear(in_features=4, out_features=2, bias=True))
    """
    kind = type(model).__name__
    if not name:
        raise HeadError(
            f"{kind} names no classifier in its pretrained_cfg, so its head cannot be found; use Classifier.from_module(model, "
            'head="NAME") with the name of its last linear layer'
        )
    if not isinstance(name, str):
        raise HeadError(
            f"{kind} has {len(name)} heads ({', '.join(name)}) whose logits are combined: there is no one head whose null space "
            "could be taken. Use the architecture without distillation, or wrap the model in a module whose forward returns the "
            f'logits of one head alone and give that to Classifier.from_module(wrapper, head="model.{name[0]}")'
        )
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        known = [n for n, m in model.named_modules() if is_linear(m)][-3:]
        raise HeadError(f"{kind} has no module {name!r}; its last linear layers are {known}") from error
    if is_linear(module) or batch_norm_and_linear(module) is not None:
        return name, module
    inner = [(n, m) for n, m in module.named_modules() if is_linear(m)]
    if not inner:
        raise HeadError(
            f"the head {name!r} of {kind} is {type(module).__name__} and holds no linear layer (the model was made with "
            "num_classes=0?); pass num_classes, or head_mode='new'"
        )
    return f"{name}.{inner[-1][0]}", inner[-1][1]


def batch_norm_and_linear(module: nn.Module) -> tuple[nn.BatchNorm1d, nn.Linear] | None:
    """The two layers of a head that is a batch norm, perhaps a dropout, and a linear layer; None for anything else."""
    layers = [child for child in module.children() if not isinstance(child, (nn.Dropout, nn.Identity))]
    if len(layers) == 2 and isinstance(layers[0], nn.BatchNorm1d) and isinstance(layers[1], nn.Linear):
        return layers[0], layers[1]
    return None


def effective_weight(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(W (C, m), b (C,) or None) of the affine map the head is in eval mode; differentiable, batch norm folded in."""
    pair = batch_norm_and_linear(head)
    if pair is None:
        weight, bias = head.weight, head.bias
        assert isinstance(weight, Tensor)
        return weight.flatten(1), bias if isinstance(bias, Tensor) else None
    norm, linear = pair
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("the head's batch norm keeps no running statistics, so it cannot be folded into the linear layer")
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale + (norm.bias if norm.bias is not None else 0.0)
    bias = linear.weight @ shift + (linear.bias if linear.bias is not None else 0.0)
    return linear.weight * scale, bias


def as_features(captured: Tensor, name: str) -> Tensor:
    """The head's input as (B, m): a 1x1 convolution's (B, m, 1, 1) is flattened.

    Raises:
        ValueError: the head is applied at several places of a map or to several tokens, so there is no one feature.
    """
    if captured.ndim > 2 and captured.shape[2:].numel() == 1:
        captured = captured.flatten(1)
    if captured.ndim != 2:
        raise ValueError(
            f"the head {name!r} gets an input of shape {tuple(captured.shape)}, several tokens or places of a map at once; expected "
            "(B, m) or (B, m, 1, 1). Use an architecture that pools before its last linear layer"
        )
    return captured


def check_is_affine(head: nn.Module, name: str) -> None:
    """Refuse a head that is not f W^T + b in eval mode: a normalised (cosine) or otherwise changed linear layer (no shapes).

    Raises:
        ValueError: the head's output on two probes is not that of its weight (C, m) and bias (C,).
    """
    weight, bias = effective_weight(head)
    if weight.is_meta:
        return
    with torch.no_grad():
        probe = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).reshape(2, -1)
        offset = weight.new_zeros(len(weight)).double() if bias is None else bias.double()
        expected = probe.double() @ weight.double().T + offset
        scale = (probe.double().abs() @ weight.double().abs().T + offset.abs()).max()
        error = (apply_head(head, probe).double() - expected).abs().max()
    if error > torch.finfo(weight.dtype).eps ** 0.5 * scale:
        raise ValueError(
            f"the head {name!r} ({type(head).__name__}) does not compute f W^T + b from its weight {tuple(weight.shape)}: it differs "
            f"by {float(error):.3g} on features in [-1, 1], so its null space is not that of its weight. Name a plain linear layer"
        )


def check_is_output(output: Tensor, logits: object, name: str) -> Tensor:
    """`logits` (B, C), when they are what the head gave, perhaps flattened or in another dtype.

    Raises:
        ValueError: the model returns something else, for instance two heads averaged or a softmax.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model returned {type(logits).__name__}, not its logits (B, C); wrap it in a module whose forward returns them"
        )
    flat = output.flatten(1)
    same = flat.shape == logits.shape and (
        flat.data_ptr() == logits.data_ptr() or torch.allclose(flat.to(logits.dtype), logits, rtol=0, atol=0, equal_nan=True)
    )
    if not same:
        raise ValueError(
            f"the model's output {tuple(logits.shape)} is not that of its head {name!r} {tuple(output.shape)}: something is done to "
            "the logits after it (a second head, a softmax, a scale?), so this head's null space is not the model's. Wrap the "
            "model in a module whose forward returns the head's output alone, and give that to Classifier.from_module"
        )
    return logits


def apply_head(head: nn.Module, features: Tensor) -> Tensor:
    """Logits (B, C) from features (B, m) through the head module itself, in its own dtype."""
    if isinstance(head, nn.Conv2d):
        return torch.flatten(head(features[:, :, None, None]), 1)
    logits: Tensor = head(features)
    return logits
