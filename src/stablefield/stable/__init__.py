"""Stable targets for any training loop, in the prediction type of its network.

| module       | what                                                                            |
|--------------|---------------------------------------------------------------------------------|
| `target`     | `StableTarget`, which replaces the line of a loop that has its target           |
| `references` | what targets are averaged over: the minibatch, or a `Bank` of recent examples   |
| `drawn`      | the same for draws from a tensor, a mapped file or a `Pool`; `WithIndex`        |
| `checks`     | what the first calls check: prediction type, alpha and sigma, scale of the data |
"""

from stablefield.stable.drawn import WithIndex
from stablefield.stable.references import Bank
from stablefield.stable.target import StableTarget

__all__ = ["Bank", "StableTarget", "WithIndex"]
