"""Computing, printing and writing of scores, with everything that they depend on."""

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

from stablefield.cli.data_command import progress_bar
from stablefield.cli.sample_source import Reference, SampleSource
from stablefield.data import Progress, content_hash, silent
from stablefield.distributed import Ranks
from stablefield.evaluate import (
    Classifier,
    Features,
    FeatureSet,
    NearestMatches,
    ScoreSummary,
    compute_scores,
    find_nearest,
    memorisation_scores,
    sample_size_notes,
    summarise,
)
from stablefield.evaluate.images import save_sheet
from stablefield.evaluate.metrics import MAX_PAIRED
from stablefield.files import append, sweep
from stablefield.kernel.accumulator import float64_device
from stablefield.pool import Pool, draw_without_replacement
from stablefield.seeding import format_seeds, generator

__all__ = ["Scorer"]

_SHOWN_PAIRS = 32
_NEAREST_BLOCK = 1024  # samples whose nearest neighbours are found in one call
_TITLES = {
    "fid": "FID",
    "kid": "KID",
    "kid_std": "  std over subsets",
    "frechet": "Frechet distance",
    "kernel": "kernel distance",
    "kernel_std": "  std over subsets",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "Inception score",
    "inception_score_std": "  std over parts",
    "nearest_distance": "nearest training image",
    "nearest_distance_held_out": "  of held-out images",
    "nearest_ratio": "  ratio of both",
    "copies": "fraction of copies",
    "copies_held_out": "  of held-out images",
}

Take = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores of samples against a reference: all ranks compute features, the main rank prints and writes the scores.

    Every method must be called on all ranks.

    Attributes:
        samples: the samples.
        reference: the reference.
        ranks: the ranks that share the work.
        batch_size: number of samples whose features are computed in one call.
        path: file that the scores are appended to, one JSON object per line.
    """

    samples: SampleSource
    reference: Reference
    ranks: Ranks
    batch_size: int
    path: Path

    def print_header(self) -> None:
        """Print what the samples and the reference are."""
        if self.ranks.is_main:
            print(_description(self.samples))
            count = "unknown number of data points" if self.reference.n is None else f"{self.reference.n:,}"
            print(f"reference   {count} of {self.reference.name}")
            pool = self.reference.pool
            if pool and pool.images != self.samples.images:
                kind, other = ("images", "floats") if self.samples.images else ("floats", "images")
                print(_note(f"samples are {kind}, the reference {other}: compared as they are, bytes as [-1, 1]"))

    def compute_features(self, features: Features) -> list[FeatureSet]:
        """Features of the samples, for each repeat; an empty list on all ranks but the main one.

        Args:
            features: the feature space.
        """
        title = f"samples, {features.name}"
        sets = [self._feature_set(features, keys, self.samples.take, title) for keys in self.samples.repeats]
        return [found for found in sets if found]

    def score(self, features: Features, repeats: Sequence[FeatureSet]) -> None:
        """Compute and write all scores in one feature space.

        Args:
            features: the feature space.
            repeats: features of the samples, from `compute_features`.
        """
        statistics, reference_features, pool = self.reference.statistics, None, self.reference.pool
        if pool is not None:
            keep = draw_without_replacement(len(pool), min(len(pool), MAX_PAIRED), generator(0, "reference"))
            title = f"reference, {features.name}"
            data = self._feature_set(features, range(len(pool)), _take_from(pool), title, keep)
            statistics, reference_features = (data.statistics, data.features) if data else (None, None)
        if not self.ranks.is_main:
            return
        assert statistics is not None
        summaries = summarise(
            [compute_scores(features, samples, statistics, reference_features) for samples in repeats]
        )
        n, dimension = len(self.samples.repeats[0]), len(statistics.mean)
        pairs = {} if reference_features is None else {"pairs": [min(n, MAX_PAIRED), len(reference_features)]}
        title = f"{features.name}: {dimension:,} features"
        if isinstance(features, Classifier):
            title += f", {features.accuracy:.1%} of held-out images classified correctly"
        metadata = features.metadata() | {"dimension": dimension} | pairs
        self._write(title, metadata, summaries, sample_size_notes(n, dimension, statistics.n))

    def write_statistics(self, path: Path, features: Features, repeats: Sequence[FeatureSet]) -> None:
        """Write mean and covariance of all samples to a file, which can be a reference.

        Args:
            path: the `.npz` file.
            features: the feature space.
            repeats: features of the samples, from `compute_features`.
        """
        if self.ranks.is_main:
            whole, pool = reduce(FeatureSet.merge, repeats), self.samples.pool
            complete = pool is not None and len(pool) == len(whole.index)
            data = content_hash(pool) if pool is not None and complete else ""
            whole.statistics.save(path, features=features.identity, data=data)
            print(f"statistics  {len(whole.index):,} in features {features.identity}: {path}")

    def score_memorisation(self, held_out: Pool | None) -> None:
        """Compute and write the memorisation scores, and a sheet of the most likely copies.

        Args:
            held_out: data that the run was not trained on; by default training data take their place, each compared
                with all others.
        """
        pool = self.reference.pool
        assert pool is not None
        source = pool if held_out is None else held_out
        drawn = draw_without_replacement(len(source), min(len(source), MAX_PAIRED), generator(0, "held out")).tolist()
        usual = self._nearest(drawn, _take_from(source), exclude_itself=held_out is None)
        results = [self._nearest(keys[:MAX_PAIRED], self.samples.take) for keys in self.samples.repeats]
        found = [result for result in results if result]
        if usual and found:
            name = "training data, each compared with all others" if held_out is None else "held-out data"
            metadata = {"name": "data", "identity": "data", "pairs": [len(found[0][0]), len(drawn)], "held_out": name}
            title = f"memorisation: Euclidean distance between data, bytes as [-1, 1]; held-out images: {name}"
            self._write(title, metadata, summarise([memorisation_scores(near, usual[1]) for _, near in found]), [])
            self._save_pairs(*found[0], pool)

    def print_path(self) -> None:
        """Print where the scores were written."""
        if self.ranks.is_main:
            print(f"\nscores      {self.path}")

    def _feature_set(
        self, features: Features, keys: Sequence[int], take: Take, title: str, keep: Int[Tensor, "k"] | None = None
    ) -> FeatureSet | None:
        """Features of data, computed by all ranks together; None on all ranks but the main one."""
        positions = self.ranks.shard(range(len(keys)))

        def blocks(progress: Progress) -> Iterator[tuple[Tensor, Tensor]]:
            for start in range(0, len(positions), self.batch_size):
                index = positions[start : start + self.batch_size]
                yield torch.tensor(index), take([keys[i] for i in index])
                progress(start + len(index), len(positions))

        with self._bar(title) as progress:
            part = FeatureSet.compute(features, blocks(progress), keep=keep)
        parts = self.ranks.gather_objects(part)
        return reduce(FeatureSet.merge, parts) if parts else None

    def _nearest(
        self, keys: Sequence[int], take: Take, exclude_itself: bool = False
    ) -> tuple[list[int], NearestMatches] | None:
        """Keys of data and their nearest neighbours in the reference; None on all ranks but the main one."""
        pool, mine = self.reference.pool, list(self.ranks.shard(keys))
        assert pool is not None
        device, parts = float64_device(self.ranks.device), []
        with self._bar("nearest") as progress:
            for start in range(0, len(mine), _NEAREST_BLOCK):
                block = mine[start : start + _NEAREST_BLOCK]
                exclude = torch.tensor(block) if exclude_itself else None
                parts.append(find_nearest(take(block).to(device), pool, exclude=exclude))
                progress(start + len(block), len(mine))
        gathered = self.ranks.gather_objects((mine, parts))
        if not gathered:
            return None
        all_keys = [key for some, _ in gathered for key in some]
        return all_keys, NearestMatches.concatenate(part for _, some in gathered for part in some)

    def _bar(self, title: str) -> AbstractContextManager[Progress]:
        return progress_bar(title) if self.ranks.is_main else nullcontext(silent)

    def _write(
        self, title: str, features: Mapping[str, Any], scores: Mapping[str, ScoreSummary], notes: Sequence[str]
    ) -> None:
        """Append a line to the file, and print a table."""
        seeds = None if self.samples.seeds is None else list(map(format_seeds, self.samples.seeds))
        samples = self.samples.metadata | {
            "seeds": seeds,
            "n": len(self.samples.repeats[0]),
            "repeats": len(self.samples.repeats),
        }
        line = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "stablefield": version("stablefield"),
            "samples": samples,
            "reference": self.reference.metadata(),
            "features": dict(features),
            "scores": {name: asdict(summary) for name, summary in scores.items()},
            "notes": list(notes),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        sweep(self.path.parent)
        append(self.path, json.dumps(line) + "\n")
        print("\n" + "\n".join([title, *map(_table_row, scores, scores.values()), *map(_note, notes)]))

    def _save_pairs(self, keys: Sequence[int], near: NearestMatches, pool: Pool) -> None:
        """Write a sheet of the samples most like copies, each with its nearest training image to the right."""
        if pool.images and self.samples.images:
            ratio = near.distance[:, 0] / near.distance[:, 1].clamp(min=1e-300)
            shown = ratio.argsort()[:_SHOWN_PAIRS]
            samples = self.samples.take([keys[i] for i in shown.tolist()])
            pairs = torch.stack([samples, pool.take(near.index[shown, 0]).to(samples)], 1).flatten(0, 1)
            path = self.path.with_name(self.path.stem.replace("scores", "nearest") + ".png")
            save_sheet(path, pairs, columns=8)
            print(f"  samples and their nearest training images, most likely copies first: {path}")


def _take_from(pool: Pool) -> Take:
    return lambda index: pool.take(torch.tensor(index))


def _description(source: SampleSource) -> str:
    """Number and origin of the samples, and how they were made."""
    metadata, repeats = source.metadata, source.repeats
    times = f"{len(repeats)} x " if len(repeats) > 1 else ""
    lines = [f"samples     {times}{len(repeats[0]):,} of {metadata['name']}"]
    if "sampler" in metadata:
        low, high = metadata.get("evaluations") or ("?", "?")
        count = f"{low}" if low == high else f"{low} to {high}"
        lines.append(f"            {metadata['sampler']}, {count} network evaluations per sample")
    return "\n".join(lines)


def _table_row(name: str, summary: ScoreSummary) -> str:
    repeats = "" if summary.std is None else f" ± {summary.std:.2g}, min {summary.min:.5g}"
    return f"  {_TITLES.get(name, name):<26}{summary.mean:.5g}{repeats}"


def _note(text: str) -> str:
    return f"  note: {text}"
