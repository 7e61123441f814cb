"""Evaluation of samples: feature spaces, distances to reference data, memorisation, and image files."""

from stablefield.evaluate.classifier import Classifier, cached_classifier, find_classifier, train_classifier
from stablefield.evaluate.features import ExportedNetwork, Features, Pixels
from stablefield.evaluate.frechet import Statistics, StatisticsAccumulator, frechet_distance
from stablefield.evaluate.image_network import EfficientNetLite0
from stablefield.evaluate.inception import Inception
from stablefield.evaluate.memorisation import NearestMatches, find_nearest, memorisation_scores
from stablefield.evaluate.metrics import FeatureSet, ScoreSummary, compute_scores, sample_size_notes, summarise
from stablefield.evaluate.pairs import kernel_distance, precision_recall

__all__ = [
    "Classifier",
    "EfficientNetLite0",
    "ExportedNetwork",
    "FeatureSet",
    "Features",
    "Inception",
    "NearestMatches",
    "Pixels",
    "ScoreSummary",
    "Statistics",
    "StatisticsAccumulator",
    "cached_classifier",
    "compute_scores",
    "find_classifier",
    "find_nearest",
    "frechet_distance",
    "kernel_distance",
    "memorisation_scores",
    "precision_recall",
    "sample_size_notes",
    "summarise",
    "train_classifier",
]
