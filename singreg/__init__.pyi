from singreg.analysis.features import fit_on_split as fit_on_split
from singreg.analysis.scores import analyze_model as analyze_model
from singreg.data.datasets import load_splits as load_splits
from singreg.data.embeddings import cached_embeddings as cached_embeddings
from singreg.functional import angle as angle
from singreg.functional import attribute_score as attribute_score
from singreg.functional import image_score as image_score
from singreg.functional import kappa as kappa
from singreg.losses import SingLoss as SingLoss
from singreg.metrics import AttributeScore as AttributeScore
from singreg.metrics import ImageScore as ImageScore
from singreg.metrics import SemanticLeakage as SemanticLeakage
from singreg.models.classifier import Classifier as Classifier
from singreg.models.edits import align_head_ as align_head_
from singreg.models.edits import drop_null as drop_null
from singreg.models.edits import interpolate_weights as interpolate_weights
from singreg.models.vlm import VisionLanguageModel as VisionLanguageModel
from singreg.nullspace import NullSpace as NullSpace
from singreg.nullspace import row_space_projection as row_space_projection
from singreg.ridge import RidgeStatistics as RidgeStatistics
from singreg.steering import steer as steer
from singreg.translator import LinearTranslator as LinearTranslator
from singreg.translator import MLPTranslator as MLPTranslator
from singreg.translator import fit_translator as fit_translator
from singreg.translator import load_translator as load_translator

__version__: str
