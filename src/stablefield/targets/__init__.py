"""Target estimators: four estimates of E[x | x_t], one formula with four supports.

| estimator     | support of an example                                      | unbiased | variance                     |
|---------------|------------------------------------------------------------|----------|------------------------------|
| `DSMTarget`   | the source alone                                           | yes      | Tr Cov[x given x_t]          |
| `STFTarget`   | the source and n - 1 references                            | yes      | less, about 1/n for large n  |
| `KNNTarget`   | the k nearest of x_t if the source is one, else the source | yes      | at most DSM's                |
| `ExactTarget` | all data                                                   | yes      | none                         |

A fifth, `PublishedSTFTarget`, is the biased estimator of published runs, for comparison with them.
"""

from stablefield.targets.base import TargetEstimator
from stablefield.targets.dsm import DSMTarget
from stablefield.targets.exact import ExactTarget
from stablefield.targets.knn import KNNTarget
from stablefield.targets.published import PublishedSTFTarget
from stablefield.targets.shard import Shard
from stablefield.targets.stf import STFTarget
from stablefield.targets.wrappers import Prefetched, Sharded

__all__ = [
    "DSMTarget",
    "ExactTarget",
    "KNNTarget",
    "Prefetched",
    "PublishedSTFTarget",
    "STFTarget",
    "Shard",
    "Sharded",
    "TargetEstimator",
]
