"""How good the samples are, how much the targets vary, and pictures of both."""

from stablefield.evaluate.features import Classifier, train_classifier
from stablefield.evaluate.field import TargetVariance, target_variance
from stablefield.evaluate.frechet import Statistics, frechet_distance

__all__ = [
    "Classifier",
    "Statistics",
    "TargetVariance",
    "frechet_distance",
    "target_variance",
    "train_classifier",
]
