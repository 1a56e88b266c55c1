"""Pictures: folders, hub data sets, class subsets and built-in scenes as fixed parts; the embedding cache."""

from singreg.data.classes import ClassSubset, named_sets, resolve_classes
from singreg.data.config import DataConfig
from singreg.data.datasets import load_splits, make_loader
from singreg.data.embeddings import cached_embeddings, encode_split
from singreg.data.pictures import UnreadableImageError
from singreg.data.splits import ConcatSplit, FolderSplit, HubSplit, ImageSplit, SceneSplit, Splits

__all__ = [
    "ClassSubset",
    "ConcatSplit",
    "DataConfig",
    "FolderSplit",
    "HubSplit",
    "ImageSplit",
    "SceneSplit",
    "Splits",
    "UnreadableImageError",
    "cached_embeddings",
    "encode_split",
    "load_splits",
    "make_loader",
    "named_sets",
    "resolve_classes",
]
