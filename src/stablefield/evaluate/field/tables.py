"""A field as a table: one line a level, quantity and size, each with its unit."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from stablefield.checkpoint import replacing
from stablefield.evaluate.field.estimate import Estimate
from stablefield.evaluate.field.gaussians import Study
from stablefield.evaluate.field.record import Field

COLUMNS = ("t", "alpha", "sigma", "quantity", "n", "value", "error", "unit")
UNITS = {"dsm": "x^2", "floor": "x^2", "ess_share": "share of N", "kl": "nats", "divergence": "1", "one_point": "share"}


def lines_of(field: Field) -> Iterator[dict[str, Any]]:
    """A field, line by line; variances and biases in units of x squared (summed), of noise (per dimension) and of the
    score (summed)."""
    for name, unit in UNITS.items():
        if unit != "x^2":
            yield from _lines(field, name, None, getattr(field, name), unit)
    variances: list[tuple[str, int | None, Estimate]] = [("dsm", None, field.dsm), ("floor", None, field.floor)]
    for n, stable in field.stable.items():
        variances += [
            ("stf", n, stable.variance),
            ("stf_squared_bias", n, stable.bias),
            ("without_source", n, stable.without),
            ("without_source_squared_bias", n, stable.without_bias),
        ]
    for name, size, found in variances:
        yield from _lines(field, name, size, found, "x^2")
        yield from _lines(field, name, size, field.in_noise(found), "noise^2 per dimension")
        yield from _lines(field, name, size, field.in_score(found), "score^2")


def lines_of_study(study: Study) -> Iterator[dict[str, Any]]:
    """Estimates beside closed forms, line by line; variances in units of x squared, summed."""
    exact = torch.zeros_like(study.sigma)
    found: list[tuple[str, int | None, Estimate, str]] = [
        ("dsm", None, study.dsm, "x^2"),
        ("dsm_closed_form", None, Estimate(study.dsm_closed, exact), "x^2"),
        ("kl", None, study.information, "nats"),
        ("kl_closed_form", None, Estimate(study.information_closed, exact), "nats"),
        ("divergence", None, study.divergence, "1"),
        ("divergence_closed_form", None, Estimate(study.divergence_closed, exact), "1"),
        ("limit_of_n_times_stf", None, study.limit, "x^2"),
    ]
    found += [("stf", n, each, "x^2") for n, each in study.stable.items()]
    found += [("stf_squared_bias", n, each, "x^2") for n, each in study.bias.items()]
    for name, n, estimate, unit in found:
        for sigma, value, error in zip(study.sigma, estimate.value, estimate.error, strict=True):
            yield _line(sigma, 1.0, sigma, name, n, value, error, unit)


def write_csv(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write lines with a head of column names."""
    with replacing(path) as beside, beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)


def _lines(field: Field, name: str, n: int | None, found: Estimate, unit: str) -> Iterator[dict[str, Any]]:
    for row in zip(field.t, field.alpha, field.sigma, found.value, found.error, strict=True):
        yield _line(*row[:3], name, n, *row[3:], unit)


def _line(
    t: Any, alpha: Any, sigma: Any, name: str, n: int | None, value: Any, error: Any, unit: str
) -> dict[str, Any]:
    numbers = (float(t), float(alpha), float(sigma), name, n, float(value), float(error), unit)
    return dict(zip(COLUMNS, numbers, strict=True))
