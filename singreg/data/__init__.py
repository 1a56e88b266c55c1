"""Pictures: folders, hub data sets, class subsets and built-in scenes as fixed parts; the embedding cache."""

from singreg.data.config import DataConfig
from singreg.data.embeddings import cached_embeddings, encode_part
from singreg.data.loading import load_parts, make_loader
from singreg.data.parts import ConcatPart, FolderPart, HubPart, ImagePart, Parts, ScenePart
from singreg.data.pictures import UnreadableImageError
from singreg.data.subsets import ClassSubset, named_sets, resolve_classes

__all__ = [
    "ClassSubset",
    "ConcatPart",
    "DataConfig",
    "FolderPart",
    "HubPart",
    "ImagePart",
    "Parts",
    "ScenePart",
    "UnreadableImageError",
    "cached_embeddings",
    "encode_part",
    "load_parts",
    "make_loader",
    "named_sets",
    "resolve_classes",
]
