"""Targets side by side: paired runs, what is measured of them, and the report."""

from stablefield.compare.experiment import Arm, Experiment
from stablefield.compare.findings import findings
from stablefield.compare.gradients import GradientVariance, gradient_variance
from stablefield.compare.jobs import run_all, yardstick_of
from stablefield.compare.report import write_report
from stablefield.compare.results import Results
from stablefield.compare.yardstick import Yardstick, make_yardstick

__all__ = [
    "Arm",
    "Experiment",
    "GradientVariance",
    "Results",
    "Yardstick",
    "findings",
    "gradient_variance",
    "make_yardstick",
    "run_all",
    "write_report",
    "yardstick_of",
]
