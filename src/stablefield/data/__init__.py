"""Where data come from, and in which order they are seen."""

from stablefield.data.batches import Batch, Shuffled
from stablefield.data.sources import Arrays, Digits, Source, Unnamed

__all__ = ["Arrays", "Batch", "Digits", "Shuffled", "Source", "Unnamed"]
