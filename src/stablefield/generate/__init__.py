"""Samples of a run on disk: the plan that decides them, the store that holds them, and image files."""

from stablefield.generate.plan import SamplingPlan, generate_samples, sample_to
from stablefield.generate.store import SampleStore

__all__ = ["SampleStore", "SamplingPlan", "generate_samples", "sample_to"]
