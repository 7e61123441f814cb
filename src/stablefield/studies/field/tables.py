"""The results of a variance study as a table, with one record for each noise level, quantity and size."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from stablefield.files import atomic_path
from stablefield.studies.field.estimate import Estimate
from stablefield.studies.field.gaussian_study import GaussianStudy
from stablefield.studies.field.record import Field

__all__ = ["COLUMNS", "UNITS", "field_records", "study_records", "write_csv"]

COLUMNS = ("t", "alpha", "sigma", "quantity", "n", "value", "standard_error", "unit")
UNITS = {"ess_share": "share of N", "kl": "nats", "divergence": "1", "single_source": "share"}


def field_records(field: Field) -> Iterator[dict[str, Any]]:
    """Records of a measured field.

    Variances and squared biases come in units of x squared (summed over the dimensions), in noise units (per dimension)
    and in score units (summed).

    Args:
        field: the measured field.
    """
    for name, unit in UNITS.items():
        yield from _records(field, name, None, getattr(field, name), unit)
    variances: list[tuple[str, int | None, Estimate]] = [("dsm", None, field.dsm), ("rounding", None, field.rounding)]
    for n, errors in field.stf.items():
        variances += [
            ("stf", n, errors.variance),
            ("stf_squared_bias", n, errors.squared_bias),
            ("without_source", n, errors.error_without_source),
            ("without_source_squared_bias", n, errors.squared_bias_without_source),
        ]
    for name, size, estimate in variances:
        yield from _records(field, name, size, estimate, "x^2")
        yield from _records(field, name, size, field.in_noise_units(estimate), "noise^2 per dimension")
        yield from _records(field, name, size, field.in_score_units(estimate), "score^2")


def study_records(study: GaussianStudy) -> Iterator[dict[str, Any]]:
    """Records of estimates and closed forms; variances in units of x squared, summed over the dimensions.

    Args:
        study: the study of two Gaussians.
    """
    exact = torch.zeros_like(study.sigma)
    estimates: list[tuple[str, int | None, Estimate, str]] = [
        ("dsm", None, study.dsm, "x^2"),
        ("dsm_closed_form", None, Estimate(study.dsm_closed, exact), "x^2"),
        ("kl", None, study.kl, "nats"),
        ("kl_closed_form", None, Estimate(study.kl_closed, exact), "nats"),
        ("divergence", None, study.divergence, "1"),
        ("divergence_closed_form", None, Estimate(study.divergence_closed, exact), "1"),
        ("limit_of_n_times_stf", None, study.limit, "x^2"),
    ]
    estimates += [("stf", n, estimate, "x^2") for n, estimate in study.stf.items()]
    estimates += [("stf_squared_bias", n, estimate, "x^2") for n, estimate in study.stf_squared_bias.items()]
    for name, n, estimate, unit in estimates:
        for sigma, value, error in zip(study.sigma, estimate.value, estimate.error, strict=True):
            yield _record(sigma, 1.0, sigma, name, n, value, error, unit)


def write_csv(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as a CSV file with a header of column names.

    Args:
        path: the file to write.
        records: mappings with the keys `COLUMNS`.
    """
    with atomic_path(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(records)


def _records(field: Field, name: str, n: int | None, estimate: Estimate, unit: str) -> Iterator[dict[str, Any]]:
    """One record for each noise level."""
    for numbers in zip(field.t, field.alpha, field.sigma, estimate.value, estimate.error, strict=True):
        yield _record(*numbers[:3], name, n, *numbers[3:], unit)


def _record(
    t: Any, alpha: Any, sigma: Any, name: str, n: int | None, value: Any, error: Any, unit: str
) -> dict[str, Any]:
    values = (float(t), float(alpha), float(sigma), name, n, float(value), float(error), unit)
    return dict(zip(COLUMNS, values, strict=True))
