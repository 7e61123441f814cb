"""Randomness is an argument: every generator comes from a seed and the name of what it is for.

A step's generator follows from (seed, images seen), an epoch's order from (seed, epoch), an image's from its own
seed. So nothing random has to be saved, and nothing depends on what happened to be drawn before.
"""

import hashlib
from collections.abc import Sequence

import torch

MOST_SEEDS = 10_000_000


def derive(seed: int, *names: str | int) -> int:
    """A 64-bit seed for one purpose, unrelated to those of all others."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *names))


def parse_seeds(text: str) -> list[int]:
    """Seeds as people write them, each once.

    >>> parse_seeds("0,3,8-11")
    [0, 3, 8, 9, 10, 11]

    Raises:
        ValueError: not numbers and ranges, a range that runs backwards, or more than ten million seeds.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            span = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise ValueError(f"seeds look like 0-63 or 0,3,8-15, not {text!r}") from None
        if not span:
            raise ValueError(f"the range {part.strip()!r} of seeds runs backwards")
        if len(seeds) + len(span) > MOST_SEEDS:
            raise ValueError(f"{text!r} asks for more than {MOST_SEEDS:,} seeds at once")
        seeds.extend(span)
    return list(dict.fromkeys(seeds))


def format_seeds(seeds: Sequence[int]) -> str:
    """Seeds as people write them; the inverse of `parse_seeds`.

    >>> format_seeds([0, 3, 8, 9, 10, 11])
    '0,3,8-11'
    """
    spans: list[list[int]] = []
    for seed in seeds:
        if spans and seed == spans[-1][1] + 1:
            spans[-1][1] = seed
        else:
            spans.append([seed, seed])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
