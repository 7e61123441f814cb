"""Diffusion models trained with the Stable Target Field."""
