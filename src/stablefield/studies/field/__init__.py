"""Variance study: variance and bias of training targets by noise level, for any data and process.

`measure_field` measures them on a data set, `VarianceReport` gives the consequences for a training, `TwoGaussians` has
everything in closed form, and `NoiseProposal` proposes noise levels for data that no model has been trained on yet.
"""

from stablefield.studies.field.distances import DataDistances
from stablefield.studies.field.estimate import Estimate
from stablefield.studies.field.gaussian_study import GaussianStudy, normal_errors, study_gaussians
from stablefield.studies.field.gaussians import TwoGaussians
from stablefield.studies.field.linear import LinearDenoiser
from stablefield.studies.field.measure import measure_field
from stablefield.studies.field.proposal import NoiseProposal
from stablefield.studies.field.record import Field, STFErrors
from stablefield.studies.field.report import VarianceReport

__all__ = [
    "DataDistances",
    "Estimate",
    "Field",
    "GaussianStudy",
    "LinearDenoiser",
    "NoiseProposal",
    "STFErrors",
    "TwoGaussians",
    "VarianceReport",
    "measure_field",
    "normal_errors",
    "study_gaussians",
]
