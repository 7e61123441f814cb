"""How good the samples are, how much the targets vary, and pictures of both."""

from stablefield.evaluate.classifier import Classifier, cached_classifier, known_classifier, train_classifier
from stablefield.evaluate.features import Exported, Features, Pixels
from stablefield.evaluate.field import Field, measure_field
from stablefield.evaluate.frechet import Statistics, Sums, frechet_distance
from stablefield.evaluate.inception import Inception
from stablefield.evaluate.memorisation import Nearest, memorised, nearest
from stablefield.evaluate.pairs import kernel_distance, precision_recall
from stablefield.evaluate.score import Cloud, Summary, remarks, scores, summarised

__all__ = [
    "Classifier",
    "Cloud",
    "Exported",
    "Features",
    "Field",
    "Inception",
    "Nearest",
    "Pixels",
    "Statistics",
    "Summary",
    "Sums",
    "cached_classifier",
    "frechet_distance",
    "kernel_distance",
    "known_classifier",
    "measure_field",
    "memorised",
    "nearest",
    "precision_recall",
    "remarks",
    "scores",
    "summarised",
    "train_classifier",
]
