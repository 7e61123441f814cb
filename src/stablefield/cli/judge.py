"""From what is judged and what it is compared with to numbers: said, and written down with all that they depend on."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from stablefield.cli.data import progress_bar
from stablefield.cli.subjects import Reference, Subject
from stablefield.data import Progress, content_hash, silent
from stablefield.evaluate import (
    Classifier,
    Cloud,
    Features,
    Nearest,
    Summary,
    memorised,
    nearest,
    remarks,
    scores,
    summarised,
)
from stablefield.evaluate.memorisation import together
from stablefield.evaluate.pictures import save_grid
from stablefield.evaluate.score import MOST_PAIRS
from stablefield.posterior import exact
from stablefield.ranks import Ranks
from stablefield.reference import Pool, distinct
from stablefield.seeding import format_seeds, generator

SHOWN = 32  # pairs in the picture
BLOCK = 1024  # rows whose nearest are looked for together
NAMES = {
    "fid": "FID",
    "kid": "KID",
    "kid_deviation": "  deviation over subsets",
    "frechet": "Frechet distance",
    "kernel": "kernel distance",
    "kernel_deviation": "  deviation over subsets",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "Inception score",
    "inception_score_deviation": "  deviation over parts",
    "nearest": "nearest training image",
    "nearest_held_out": "  from fresh images",
    "nearest_ratio": "  ratio of both",
    "copies": "share of copies",
    "copies_held_out": "  among fresh images",
}

Take = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True, eq=False)
class Judge:
    """Measures by all ranks, and speaks by the first.

    Attributes:
        subject: what is judged.
        reference: what it is compared with.
        ranks: who works.
        batch: how many rows are looked at together.
        place: the file that scores are added to.
    """

    subject: Subject
    reference: Reference
    ranks: Ranks
    batch: int
    place: Path

    def introduce(self) -> None:
        """Say what is judged."""
        if self.ranks.first:
            print(_described(self.subject))
            count = "an unknown number" if self.reference.n is None else f"{self.reference.n:,}"
            print(f"reference   {count} of {self.reference.name}")
            pool = self.reference.pool
            if pool and pool.images != self.subject.images:
                ours, theirs = ("images", "floats") if self.subject.images else ("floats", "images")
                print(_note(f"samples are {ours}, the reference {theirs}: compared as they are, bytes as [-1, 1]"))

    def clouds(self, space: Features) -> list[Cloud]:
        """The samples in these features, for each repeat; none but on the first rank."""
        subject = self.subject
        found = [self._whole(space, rows, subject.take, f"samples, {space.name}") for rows in subject.repeats]
        return [cloud for cloud in found if cloud]

    def score(self, space: Features, clouds: Sequence[Cloud]) -> None:
        """All numbers in these features."""
        statistics, members, pool = self.reference.statistics, None, self.reference.pool
        if pool is not None:
            keep = distinct(len(pool), min(len(pool), MOST_PAIRS), generator(0, "reference"))
            cloud = self._whole(space, range(len(pool)), taker(pool), f"reference, {space.name}", keep)
            statistics, members = (cloud.statistics, cloud.features) if cloud else (None, None)
        if not self.ranks.first:
            return
        assert statistics is not None
        found = summarised([scores(space, cloud, statistics, members) for cloud in clouds])
        n, dimension = len(self.subject.repeats[0]), len(statistics.mean)
        pairs = {} if members is None else {"pairs": [min(n, MOST_PAIRS), len(members)]}
        told = [f"{dimension:,} features"]
        told += [f"{space.accuracy:.1%} of unseen images right"] if isinstance(space, Classifier) else []
        about = space.about() | {"dimension": dimension} | pairs
        self._write(f"{space.name}: {', '.join(told)}", about, found, remarks(n, dimension, statistics.n))

    def save(self, path: Path, space: Features, clouds: Sequence[Cloud]) -> None:
        """Mean and covariance of all samples, to be a reference."""
        if self.ranks.first:
            whole, pool = reduce(Cloud.merge, clouds), self.subject.pool
            complete = pool is not None and len(pool) == len(whole.index)
            data = content_hash(pool) if pool is not None and complete else ""
            whole.statistics.save(path, features=space.identity, data=data)
            print(f"statistics  {len(whole.index):,} in features {space.identity}: {path}")

    def remember(self, unseen: Pool | None) -> None:
        """How near samples are to the training data, against unseen images, or training images left out."""
        pool = self.reference.pool
        assert pool is not None
        source = pool if unseen is None else unseen
        some = distinct(len(source), min(len(source), MOST_PAIRS), generator(0, "held out")).tolist()
        fresh = self._nearest(some, taker(source), itself=unseen is None)
        tried = [self._nearest(rows[:MOST_PAIRS], self.subject.take) for rows in self.subject.repeats]
        found = [pair for pair in tried if pair]
        if fresh and found:
            whose = "members of the reference, each without itself" if unseen is None else "held-out data"
            about = {"name": "data", "identity": "data", "pairs": [len(found[0][0]), len(some)], "fresh": whose}
            title = f"memorisation: Euclidean distance between data, bytes as [-1, 1]; fresh images: {whose}"
            self._write(title, about, summarised([memorised(near, fresh[1]) for _, near in found]), [])
            self._picture(*found[0], pool)

    def conclude(self) -> None:
        """Say where it is written."""
        if self.ranks.first:
            print(f"\nscores      {self.place}")

    def _whole(
        self, space: Features, rows: Sequence[int], take: Take, title: str, keep: Int[Tensor, "k"] | None = None
    ) -> Cloud | None:
        """Rows in some features, by all ranks together; None but on the first."""

        share = self.ranks.share(range(len(rows)))

        def blocks(progress: Progress) -> Iterator[tuple[Tensor, Tensor]]:
            for start in range(0, len(share), self.batch):
                index = share[start : start + self.batch]
                yield torch.tensor(index), take([rows[i] for i in index])
                progress(start + len(index), len(share))

        with self._bar(title) as progress:
            part = Cloud.of(space, blocks(progress), keep=keep)
        parts = self.ranks.collect(part)
        return reduce(Cloud.merge, parts) if parts else None

    def _nearest(self, rows: Sequence[int], take: Take, itself: bool = False) -> tuple[list[int], Nearest] | None:
        """Rows and their nearest members of the reference, by all ranks together; None but on the first."""
        pool, share = self.reference.pool, list(self.ranks.share(rows))
        assert pool is not None
        device, parts = exact(self.ranks.device), []
        with self._bar("nearest") as progress:
            for start in range(0, len(share), BLOCK):
                part = share[start : start + BLOCK]
                parts.append(nearest(take(part).to(device), pool, itself=torch.tensor(part) if itself else None))
                progress(start + len(part), len(share))
        all_ = self.ranks.collect((share, parts))
        if not all_:
            return None
        return [row for some, _ in all_ for row in some], together(part for _, some in all_ for part in some)

    def _bar(self, title: str) -> AbstractContextManager[Progress]:
        return progress_bar(title) if self.ranks.first else nullcontext(silent)

    def _write(
        self, title: str, features: Mapping[str, Any], found: Mapping[str, Summary], said: Sequence[str]
    ) -> None:
        """A line of the file, and a table for people."""
        seeds = None if self.subject.seeds is None else list(map(format_seeds, self.subject.seeds))
        samples = self.subject.about | {
            "seeds": seeds,
            "n": len(self.subject.repeats[0]),
            "repeats": len(self.subject.repeats),
        }
        line = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "stablefield": version("stablefield"),
            "samples": samples,
            "reference": self.reference.about(),
            "features": dict(features),
            "scores": {name: asdict(summary) for name, summary in found.items()},
            "remarks": list(said),
        }
        self.place.parent.mkdir(parents=True, exist_ok=True)
        with self.place.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print("\n" + "\n".join([title, *map(_row, found, found.values()), *map(_note, said)]))

    def _picture(self, rows: Sequence[int], near: Nearest, pool: Pool) -> None:
        """The samples that look most like copies, each with its nearest training image to the right."""
        if pool.images and self.subject.images:
            worst = (near.distance[:, 0] / near.distance[:, 1].clamp(min=1e-300)).argsort()[:SHOWN]
            samples = self.subject.take([rows[i] for i in worst.tolist()])
            pairs = torch.stack([samples, pool.take(near.index[worst, 0]).to(samples)], 1).flatten(0, 1)
            place = self.place.with_name(self.place.stem.replace("scores", "nearest") + ".png")
            save_grid(place, pairs, columns=8)
            print(f"  pairs of a sample and its nearest training image, the likeliest copies first: {place}")


def taker(pool: Pool) -> Take:
    """Members by their numbers."""
    return lambda rows: pool.take(torch.tensor(rows))


def _described(subject: Subject) -> str:
    about, repeats = subject.about, subject.repeats
    lines = [f"samples     {f'{len(repeats)} x ' if len(repeats) > 1 else ''}{len(repeats[0]):,} of {about['from']}"]
    if "sampler" in about:
        low, high = about.get("evaluations") or ("?", "?")
        cost = f"{low}" if low == high else f"{low} to {high}"
        lines.append(f"            {about['sampler']}, {cost} network evaluations each")
    return "\n".join(lines)


def _row(name: str, summary: Summary) -> str:
    more = "" if summary.deviation is None else f" ± {summary.deviation:.2g}, least {summary.least:.5g}"
    return f"  {NAMES.get(name, name):<26}{summary.mean:.5g}{more}"


def _note(remark: str) -> str:
    return f"  note: {remark}"
