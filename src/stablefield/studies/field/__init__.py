"""Variance study: variance and bias of training targets by noise level, for any data and process.

`measure` measures them on a data set, `VarianceReport` gives the consequences for a training, and `propose_noise`
proposes noise levels for data that no model has been trained on yet.
"""

from stablefield.studies.field.distances import DataDistances
from stablefield.studies.field.linear import LinearDenoiser
from stablefield.studies.field.proposal import NoiseProposal, propose_noise
from stablefield.studies.field.report import VarianceReport, write_study
from stablefield.studies.field.study import STFErrors, VarianceStudy, measure

__all__ = [
    "DataDistances",
    "LinearDenoiser",
    "NoiseProposal",
    "STFErrors",
    "VarianceReport",
    "VarianceStudy",
    "measure",
    "propose_noise",
    "write_study",
]
