"""Comparison of training targets: paired runs, endpoints that are fixed before them, and a page of what was found."""

from stablefield.studies.compare.comparison import Comparison, compare, define, describe_machine
from stablefield.studies.compare.endpoints import Endpoint, Finding
from stablefield.studies.compare.experiment import Arm, Experiment
from stablefield.studies.compare.gradients import GradientVariance, gradient_variance
from stablefield.studies.compare.page import summarize, write_page
from stablefield.studies.compare.runs import measure_steps
from stablefield.studies.compare.statistics import Estimate

__all__ = [
    "Arm",
    "Comparison",
    "Endpoint",
    "Estimate",
    "Experiment",
    "Finding",
    "GradientVariance",
    "compare",
    "define",
    "describe_machine",
    "gradient_variance",
    "measure_steps",
    "summarize",
    "write_page",
]
