"""Image splits of a data set."""

from singreg.data.loading import load_parts as load_splits
from singreg.data.loading import make_loader
from singreg.data.parts import ConcatPart, FolderPart, ScenePart
from singreg.data.parts import ImagePart as ImageSplit
from singreg.data.parts import Parts as Splits

__all__ = ["ConcatPart", "FolderPart", "ImageSplit", "ScenePart", "Splits", "load_splits", "make_loader"]
