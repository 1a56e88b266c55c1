"""VisionLanguageModel: a frozen open_clip model that turns images and prompts into vectors of one space."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from singreg.utils import plain

DEFAULT_TEMPLATES = ("an image of a {class}",)


class VisionLanguageModel(nn.Module):
    """A frozen VLM in eval mode (METHOD section 2), made with `from_open_clip`.

    `transform` is its own evaluation preprocessing, `preprocessing` the same as a JSON-able dict, `dim` is n.
    """

    def __init__(self, model: nn.Module, tokenizer: Callable[..., Tensor], *, tag: str, variant: str = "") -> None:
        super().__init__()
        # Channels-last is half again as fast for convolutional towers on a CPU, and the same to rounding for all.
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.tokenizer, self.tag = tokenizer, tag
        self.preprocessing: dict[str, Any] = plain(open_clip.get_model_preprocess_cfg(model))
        cfg = open_clip.transform.PreprocessCfg(**self.preprocessing)
        self.transform: Callable[[Image.Image], Tensor] = open_clip.transform.image_transform_v2(cfg, is_train=False)
        self.weights_hash = hash_of_state(model, variant)
        self.dim = self.embed_texts(["an image"]).shape[-1]

    @classmethod
    def from_open_clip(
        cls, name: str, pretrained: str | None = None, *, device: str | torch.device = "cpu"
    ) -> "VisionLanguageModel":
        """Load "ViT-L-14" with a tag or a weight file as `pretrained`, "local-dir:FOLDER", or "hf-hub:ORG/REPO".

        The activation is taken from the tag. A weight file carries no such note: name the architecture it was trained
        with, such as "ViT-L-14-quickgelu".
        """
        if name.startswith("local-dir:~"):
            name = f"local-dir:{Path(name.removeprefix('local-dir:')).expanduser()}"
        quick_gelu = needs_quick_gelu(name, pretrained)
        tag = name if pretrained is None else f"{name}/{Path(pretrained).name}"
        loading: Any = {"device": device, "force_quick_gelu": quick_gelu, "weights_only": True}
        try:
            # Without require_pretrained, missing weights would only be logged and left random.
            model = open_clip.create_model(name, pretrained, require_pretrained=True, pretrained_text=False, **loading)
            tokenizer = open_clip.get_tokenizer(name)
        except (SafetensorError, UnpicklingError, RuntimeError, OSError) as error:
            raise ValueError(f"the weights of {tag} could not be loaded; open_clip says: {error}") from error
        return cls(model, tokenizer, tag=tag, variant="quickgelu" if quick_gelu else "")

    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """Stay in eval mode whatever is asked, inside a larger module too."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Return raw (not normalised) float32 embeddings (B, n) of preprocessed images (B, 3, H, W)."""
        with torch.autocast(self.device.type, enabled=False):
            images = images.to(self.device, memory_format=torch.channels_last)
            embedded: Tensor = self.model.encode_image(images)  # type: ignore[operator]
        return embedded.float()

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Return one unit row per prompt, (K, n) float32."""
        if isinstance(prompts, str) or not len(prompts) or not all(prompt.strip() for prompt in prompts):
            raise ValueError(f"expected a list of prompts, none blank; got {prompts!r}")
        rows = []
        for start in range(0, len(prompts), 256):
            with torch.autocast(self.device.type, enabled=False):
                some = list(prompts[start : start + 256])
                tokens = self.tokenizer(some).to(self.device)
                # Where a further word changes nothing, the end is cut off already, and the class's name may be in it.
                full = (self.tokenizer([f"{prompt} x" for prompt in some]).to(self.device) == tokens).all(1)
                if bool(full.any()):
                    said = f"tokens has no room for the prompt {some[int(full.nonzero()[0])][:50]!r}: shorten it"
                    raise ValueError(f"the text encoder's context of {tokens.shape[1]} {said}")
                rows.append(self.model.encode_text(tokens).float())  # type: ignore[operator]
        return F.normalize(torch.cat(rows), dim=-1)

    def embed_classes(self, names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> Tensor:
        """Return one unit row per class (C, n): the mean over templates of the unit rows, normalised again.

        `{class}` in a template is replaced by the name as it is ("a"/"an" is not adapted: the text stays the paper's).
        """
        if isinstance(templates, str) or not len(templates) or not all("{class}" in each for each in templates):
            raise ValueError(f"every template must contain {{class}}, as in {DEFAULT_TEMPLATES}; got {templates!r}")
        if isinstance(names, str) or not len(names) or not all(name.strip() for name in names):
            raise ValueError(f"expected a list of class names, none blank; got {names!r}")
        rows = self.embed_texts([template.replace("{class}", name) for name in names for template in templates])
        return F.normalize(rows.reshape(len(names), len(templates), -1).mean(dim=1), dim=-1)


def hash_of_state(model: nn.Module | Mapping[str, Tensor], extra: str = "") -> str:
    """Return the SHA-256 of a module's state: names sorted, each with dtype, shape and bytes."""
    digest = hashlib.sha256(extra.encode())
    for name, tensor in sorted((model.state_dict() if isinstance(model, nn.Module) else model).items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)};".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def needs_quick_gelu(name: str, pretrained: str | None) -> bool:
    """Return whether QuickGELU must be forced; raise for what open_clip would load with random or other weights."""
    schema, identifier = open_clip.factory.parse_model_name(name)
    if schema is not None:
        if pretrained is not None:
            raise ValueError(f"{name!r} brings its own weights: set vlm.pretrained to null, not {pretrained!r}")
        folder = Path(identifier)
        if schema == "local-dir" and not (folder / "open_clip_config.json").is_file():
            raise FileNotFoundError(f"no open_clip_config.json in {folder}")
        suffixes = (".safetensors", ".bin", ".pth")
        if schema == "local-dir" and not any(path.suffix in suffixes for path in folder.iterdir()):
            raise FileNotFoundError(f"no weights in {folder}: expected {folder / 'open_clip_model.safetensors'}")
        return False
    name = identifier.replace("/", "-")
    architecture = open_clip.get_model_config(name)
    if architecture is None:
        raise ValueError(f"open_clip knows no model {name!r} (see open_clip.list_models()); or pass local-dir:FOLDER")
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)[:12]) or "none"
    if pretrained is None:
        raise ValueError(f"{name!r} needs weights: pass pretrained= a weight file or one of {tags}")
    tag_config = open_clip.pretrained.get_pretrained_cfg(name, pretrained)
    if not tag_config:
        if Path(pretrained).is_file():
            return False
        raise ValueError(f"pretrained={pretrained!r} is neither a file nor a tag of {name!r}; tags: {tags}")
    quick = bool(tag_config.get("quick_gelu", False))
    if architecture.get("quick_gelu", False) and not quick:
        raise ValueError(f"weights {pretrained!r} are without QuickGELU: use {name.removesuffix('-quickgelu')!r}")
    return quick
