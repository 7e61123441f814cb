"""Comparison of training targets: paired runs, what is measured of them, and the report."""

from stablefield.studies.compare.evaluator import Evaluator, make_evaluator
from stablefield.studies.compare.experiment import Arm, Experiment
from stablefield.studies.compare.gradients import GradientVariance, gradient_variance
from stablefield.studies.compare.jobs import cached_evaluator, run_all
from stablefield.studies.compare.report import write_report
from stablefield.studies.compare.results import Results
from stablefield.studies.compare.summary import summarize

__all__ = [
    "Arm",
    "Evaluator",
    "Experiment",
    "GradientVariance",
    "Results",
    "cached_evaluator",
    "gradient_variance",
    "make_evaluator",
    "run_all",
    "summarize",
    "write_report",
]
