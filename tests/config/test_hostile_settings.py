"""Settings that mean nothing are refused where they enter, and every other setting gives finite numbers."""

import math

import pytest
import torch

from stablefield.build import build_denoiser
from stablefield.config import ConfigError, resolve
from stablefield.config.reference import describe_config

NUMBERS = [math.nan, math.inf, -math.inf, -1, 0, -1e-300, 1e-320, 1e300, 1e18, 2**31, 10**18, 10**400]
VALUES = [*NUMBERS, [], [-1], [10**18] * 3, "\x1b[2J"]
SECTIONS = ("process", "times", "weight", "preconditioning", "network", "sampler", "grid", "training")
ENTRIES = [entry for section in SECTIONS for entry in describe_config(section)]
U = torch.tensor([0.001, 0.5, 0.999], dtype=torch.float64)


def used(config, section):
    """The numbers that a component gives."""
    process = config.make("process")
    t = config.make("times").quantile(U)
    match section:
        case "process":
            return torch.stack(process.scales(torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64)))
        case "times":
            return t
        case "weight":
            return config.make("weight")(process, t)
        case "preconditioning":
            low, high = config.make("preconditioning").noise_range
            assert low < high
            levels = process.time(torch.tensor([max(low, 0.01), min(high, 50.0)], dtype=torch.float64))
            return torch.stack(config.make("preconditioning")(process, levels))
        case "network":
            return torch.stack([p.abs().max() for p in build_denoiser(config, (3, 16, 16), 0).parameters()])
    noise_range = config.make("preconditioning").noise_range
    return config.make("grid").within(process, config.sections["sampler"]["steps"], noise_range)


def refused(sections, section):
    """The error for a configuration; None if it is used and gives finite numbers."""
    try:
        numbers = used(resolve(sections), section)
    except ConfigError as error:
        return str(error)
    assert numbers.isfinite().all(), sections
    return None


@pytest.mark.parametrize("entry", ENTRIES, ids=[f"{entry.section}-{entry.kind}" for entry in ENTRIES])
def test_a_setting_is_refused_in_short_lines_or_gives_finite_numbers(entry):
    named = {} if entry.section == "training" else {"kind": entry.kind}
    named |= {key.name: "epsilon" for key in entry.keys if key.name == "prediction_type"}
    for key in entry.keys:
        for value in VALUES:
            error = refused({entry.section: {**named, key.name: value}}, entry.section)
            lines = ["fine"] if error is None else error.split("\n")
            assert all(line and line.isprintable() and len(line) < 1000 for line in lines), error
