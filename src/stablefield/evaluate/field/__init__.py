"""The variance laboratory: how much targets vary, how biased they are, and where, for any data and process.

`measure_field` measures, `Advice` says what follows for a training, `TwoGaussians` has the answers in closed form,
and `Proposal` finds noise levels for data that nobody has trained on yet.
"""

from stablefield.evaluate.field.advice import Advice
from stablefield.evaluate.field.estimate import Estimate
from stablefield.evaluate.field.extent import Extent
from stablefield.evaluate.field.gaussians import Study, TwoGaussians, normal_errors, study_gaussians
from stablefield.evaluate.field.linear import Linear
from stablefield.evaluate.field.measure import measure_field
from stablefield.evaluate.field.proposal import Proposal
from stablefield.evaluate.field.record import Field, Stable

__all__ = [
    "Advice",
    "Estimate",
    "Extent",
    "Field",
    "Linear",
    "Proposal",
    "Stable",
    "Study",
    "TwoGaussians",
    "measure_field",
    "normal_errors",
    "study_gaussians",
]
