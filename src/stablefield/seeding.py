"""Seeding: every random generator is derived from a seed and the name of its purpose.

A training step's generator is derived from (seed, images seen), an epoch's order from (seed, epoch), and a sample's
from its own seed. So no generator state has to be saved, and no draw depends on earlier draws.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch

MAX_SEEDS = 10_000_000  # in one list; more is taken for a typing error
_SEEDS = 2**32  # number of different seeds of a sample


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one purpose, independent of the seeds of all other purposes.

    Args:
        seed: the seed of the run.
        *names: the purpose, for example `"step", 5`.
    """
    return _number(hashlib.blake2b("/".join(map(str, (seed, *names))).encode(), digest_size=8))


def derive_each(seed: int, name: str, numbers: Iterable[int]) -> Iterator[int]:
    """`derive(seed, name, number)` for each of many numbers, in less time.

    Args:
        seed: the seed of the run.
        name: the purpose.
        numbers: what distinguishes the seeds.

    >>> list(derive_each(0, "noise", [7])) == [derive(0, "noise", 7)]
    True
    """
    start = hashlib.blake2b(f"{seed}/{name}/".encode(), digest_size=8)
    for number in numbers:
        digest = start.copy()
        digest.update(b"%d" % number)
        yield _number(digest)


def _number(digest: "hashlib.blake2b") -> int:
    return int.from_bytes(digest.digest(), "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for one purpose.

    Args:
        seed: the seed of the run.
        *names: the purpose, as in `derive`.
    """
    return torch.Generator().manual_seed(derive(seed, *names))


def parse_seeds(text: str) -> list[int]:
    """The seeds of a comma-separated list of numbers and ranges, without repetitions.

    >>> parse_seeds("0,3,8-11")
    [0, 3, 8, 9, 10, 11]

    Args:
        text: the list; both ends of a range are included.

    Raises:
        ValueError: an entry is not a number or a range, a range has its larger end first, there are more than ten
            million seeds, or one is not below 2^32.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            span = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise ValueError(f"seeds must be numbers and ranges like 0-63 or 0,3,8-15, not {text!r}") from None
        if not span:
            raise ValueError(f"the range of seeds {part.strip()!r} is empty: write the smaller seed first")
        if len(seeds) + len(span) > MAX_SEEDS:
            raise ValueError(f"{text!r} has more than {MAX_SEEDS:,} seeds")
        seeds.extend(span)
    seeds = list(dict.fromkeys(seeds))
    check_seeds(seeds)
    return seeds


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds that would give the same sample twice: samplers take seeds modulo 2^32.

    Args:
        seeds: the seeds of samples.

    Raises:
        ValueError: there are none, one occurs twice, or one is negative or not below 2^32.
    """
    if not len(seeds):
        raise ValueError("there are no seeds; give at least one")
    least, most = min(seeds), max(seeds)
    if least < 0 or most >= _SEEDS:
        raise ValueError(f"seeds must be from 0 to {_SEEDS - 1}, not {least if least < 0 else most}")
    if len(set(seeds)) < len(seeds):
        repeated = next(seed for seed, count in Counter(seeds).items() if count > 1)
        raise ValueError(f"the seed {repeated} occurs more than once; each sample needs a seed of its own")


def format_seeds(seeds: Sequence[int]) -> str:
    """Seeds as a comma-separated list of numbers and ranges; the inverse of `parse_seeds`.

    >>> format_seeds([0, 3, 8, 9, 10, 11])
    '0,3,8-11'

    Args:
        seeds: the seeds; consecutive ones become a range.
    """
    spans: list[list[int]] = []
    for seed in seeds:
        if spans and seed == spans[-1][1] + 1:
            spans[-1][1] = seed
        else:
            spans.append([seed, seed])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
