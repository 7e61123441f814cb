"""Laws of seeding: independent seeds for every purpose, and lists of seeds as text."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablefield.seeding import derive, format_seeds, generator, parse_seeds


def test_every_purpose_has_its_own_valid_seed() -> None:
    purposes = [(seed, name, step) for seed, name, step in product((0, 1, 10, -1), ("step", "epoch"), range(50))]
    seeds = [derive(*purpose) for purpose in purposes]
    assert len(set(seeds)) == len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [derive(*purpose) for purpose in purposes]


def test_a_generator_does_not_depend_on_earlier_draws() -> None:
    wanted = torch.randn(3, generator=generator(1, "step", 5))
    torch.manual_seed(0)
    torch.randn(3, generator=generator(1, "step", 4))
    assert torch.equal(torch.randn(3, generator=generator(1, "step", 5)), wanted)
    assert not torch.equal(torch.randn(3, generator=generator(2, "step", 5)), wanted)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 20)), min_size=1))
def test_lists_of_seeds_are_parsed_and_formatted(spans: list[tuple[int, int]]) -> None:
    text = ",".join(f"{first}-{first + more}" if more else str(first) for first, more in spans)
    every = (seed for first, more in spans for seed in range(first, first + more + 1))
    seeds = parse_seeds(text)
    assert seeds == list(dict.fromkeys(every))
    assert parse_seeds(format_seeds(seeds)) == seeds


@pytest.mark.parametrize("text", ["", "a", "1,", "3-", "-3", "1-2-3", "1;2", "5-4", "1.5"])
def test_text_that_is_not_a_list_of_seeds_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="seeds"):
        parse_seeds(text)


def test_more_than_ten_million_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 10,000,000"):
        parse_seeds("0-99999999999")
