"""Evaluation of samples: feature spaces, distances to reference data, memorisation, and image files."""

from stablefield.evaluate.classifier import Classifier, cached_classifier, find_classifier, train_classifier
from stablefield.evaluate.estimate import Estimate
from stablefield.evaluate.evaluation import evaluate, feature_statistics
from stablefield.evaluate.features import ExportedNetwork, Features, Pixels
from stablefield.evaluate.frechet import Statistics, StatisticsAccumulator, frechet_distance
from stablefield.evaluate.image_network import EfficientNetLite0
from stablefield.evaluate.inception import Inception
from stablefield.evaluate.inputs import Reference
from stablefield.evaluate.memorisation import NearestMatches, find_nearest, memorisation_scores
from stablefield.evaluate.metrics import METRICS, FeatureSet, compute_scores, sample_size_notes, summarise
from stablefield.evaluate.pairs import kernel_distance, precision_recall
from stablefield.evaluate.scores import Scores, ScoreTable

__all__ = [
    "METRICS",
    "Classifier",
    "EfficientNetLite0",
    "Estimate",
    "ExportedNetwork",
    "FeatureSet",
    "Features",
    "Inception",
    "NearestMatches",
    "Pixels",
    "Reference",
    "ScoreTable",
    "Scores",
    "Statistics",
    "StatisticsAccumulator",
    "cached_classifier",
    "compute_scores",
    "evaluate",
    "feature_statistics",
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
