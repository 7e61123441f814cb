"""Evaluation of samples: their scores against a reference, with everything that the scores depend on.

    scores = evaluate("runs/digits-stf", repeats=3)
    scores["frechet"].mean, scores["frechet"].error

With several ranks all compute features and distances, and the main rank the scores.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from stablefield.data import Progress, StageProgress, content_hash, silent_stage
from stablefield.distributed import Ranks
from stablefield.evaluate.estimate import Estimate
from stablefield.evaluate.features import Features
from stablefield.evaluate.frechet import Statistics
from stablefield.evaluate.inputs import (
    Reference,
    SampleSource,
    Take,
    is_run,
    open_reference,
    open_samples,
    sample_run,
    take_from,
    training_reference,
)
from stablefield.evaluate.memorisation import NearestMatches, find_nearest, memorisation_scores
from stablefield.evaluate.metrics import (
    MAX_PAIRED,
    METRICS,
    FeatureSet,
    compute_scores,
    sample_size_notes,
    summarise,
)
from stablefield.evaluate.scores import Scores, ScoreTable
from stablefield.evaluate.spaces import Spaces, open_features
from stablefield.generate import SamplingPlan
from stablefield.kernel.accumulator import float64_device
from stablefield.kinds import ConfigError, refuse_if
from stablefield.pool import Pool, draw_without_replacement
from stablefield.precision import arithmetic
from stablefield.run import TrainedRun
from stablefield.seeding import format_seeds, generator

_USUAL_SAMPLES = 50_000  # number of samples that papers report FID of
_SHOWN_PAIRS = 32
_NEAREST_BLOCK = 1024  # samples whose nearest neighbours are found in one call

Scored = str | Path | TrainedRun | SamplingPlan | Pool | Tensor
Compared = str | Path | Pool | Tensor | Statistics | Reference


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Samples and what they are scored with.

    Attributes:
        samples: the samples.
        reference: the reference; without one, only statistics of the features are computed.
        held_out: data that the run was not trained on; by default training data take their place, each compared with
            all others.
        spaces: the feature spaces.
        metrics: names of the metrics to compute.
        ranks: the ranks that share the work; all must iterate over `tables`.
        batch_size: number of samples whose features are computed in one call.
        progress: opens a progress callback for each stage.
    """

    samples: SampleSource
    reference: Reference | None
    held_out: Pool | None
    spaces: Sequence[Features]
    metrics: Collection[str]
    ranks: Ranks
    batch_size: int = 64
    progress: StageProgress = silent_stage

    def tables(self) -> Iterator[ScoreTable]:
        """The tables, each as soon as it is computed; on the main rank only."""
        for space in self.spaces:
            if table := self._score(space):
                yield table
        pool = self.reference.pool if self.reference and "memorisation" in self.metrics else None
        if pool and (table := self._score_memorisation(pool)):
            yield table

    def _score(self, features: Features) -> ScoreTable | None:
        """The scores in one feature space."""
        title = f"samples, {features.name}"
        sets = [self._feature_set(features, keys, self.samples.take, title) for keys in self.samples.repeats]
        repeats = [found for found in sets if found]
        data = self._reference_features(features)
        if not repeats:
            return None
        whole, pool = reduce(FeatureSet.merge, repeats), self.samples.pool
        data_hash = content_hash(pool) if pool is not None and len(pool) == len(whole.index) else ""
        described = replace(whole.statistics, features=features.identity, data=data_hash)
        metadata = features.metadata() | {"dimension": len(described.mean)}
        if self.reference is None:
            return self._table({}, metadata, statistics=described)
        statistics, reference_features = data if data else (self.reference.statistics, None)
        assert statistics is not None
        scores = [compute_scores(features, each, statistics, reference_features, self.metrics) for each in repeats]
        n = len(self.samples.repeats[0])
        pairs = {} if reference_features is None else {"pairs": [min(n, MAX_PAIRED), len(reference_features)]}
        notes = [
            *self._notes(),
            *features.reference_notes(statistics),
            *sample_size_notes(n, len(statistics.mean), statistics.n),
        ]
        return self._table(summarise(scores), metadata | pairs, notes, described)

    def _notes(self) -> list[str]:
        """Notes on samples and a reference of different kinds."""
        pool = self.reference and self.reference.pool
        if not pool or pool.images == self.samples.images:
            return []
        kind, other = ("images", "floats") if self.samples.images else ("floats", "images")
        return [f"samples are {kind}, the reference {other}: compared as they are, bytes as [-1, 1]"]

    def _reference_features(self, features: Features) -> tuple[Statistics, Tensor] | None:
        """Statistics of the reference's features, and those of some data points; None if the data are not given."""
        if self.reference is None or self.reference.pool is None:
            return None
        pool, computed = self.reference.pool, self.reference.computed
        if features.identity not in computed:
            keep = draw_without_replacement(len(pool), min(len(pool), MAX_PAIRED), generator(0, "reference"))
            title = f"reference, {features.name}"
            data = self._feature_set(features, range(len(pool)), take_from(pool), title, keep)
            computed[features.identity] = data and (data.statistics, data.features)
        found: tuple[Statistics, Tensor] | None = computed[features.identity]
        return found

    def _score_memorisation(self, pool: Pool) -> ScoreTable | None:
        """The memorisation scores, and the most likely copies."""
        source, usual = pool if self.held_out is None else self.held_out, ("nearest", self.held_out)
        assert self.reference is not None
        computed = self.reference.computed
        if usual not in computed:
            count = min(len(source), MAX_PAIRED)
            drawn = draw_without_replacement(len(source), count, generator(0, "held out")).tolist()
            computed[usual] = self._nearest(pool, drawn, take_from(source), exclude_itself=self.held_out is None)
        results = [self._nearest(pool, keys[:MAX_PAIRED], self.samples.take) for keys in self.samples.repeats]
        found = [result for result in results if result]
        if not (computed[usual] and found):
            return None
        drawn, held_out = computed[usual]
        name = "training data, each compared with all others" if self.held_out is None else "held-out data"
        metadata = {"name": "data", "identity": "data", "pairs": [len(found[0][0]), len(drawn)], "held_out": name}
        scores = summarise([memorisation_scores(near, held_out) for _, near in found])
        return self._table(scores, metadata, pairs=self._pairs(*found[0], pool))

    def _table(
        self,
        scores: Mapping[str, Estimate],
        features: Mapping[str, Any],
        notes: Sequence[str] = (),
        statistics: Statistics | None = None,
        pairs: Tensor | None = None,
    ) -> ScoreTable:
        repeats, seeds = self.samples.repeats, self.samples.seeds
        samples = self.samples.metadata | {
            "seeds": None if seeds is None else list(map(format_seeds, seeds)),
            "n": len(repeats[0]),
            "repeats": len(repeats),
        }
        reference = self.reference.metadata() if self.reference else {}
        return ScoreTable(scores, samples, reference, features, notes, statistics, pairs)

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

        with self._stage(title) as progress:
            part = FeatureSet.compute(features, blocks(progress), keep=keep)
        if self.ranks.world_size == 1:
            return part
        parts = self.ranks.gather_objects(part.to(torch.device("cpu")))  # other ranks may have other devices
        return reduce(FeatureSet.merge, parts) if parts else None

    def _nearest(
        self, pool: Pool, keys: Sequence[int], take: Take, exclude_itself: bool = False
    ) -> tuple[list[int], NearestMatches] | None:
        """Keys of data and their nearest neighbours in the pool; None on all ranks but the main one."""
        mine = list(self.ranks.shard(keys))
        device, parts = float64_device(self.ranks.device), []
        with self._stage("nearest") as progress:
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

    def _stage(self, title: str) -> AbstractContextManager[Progress]:
        return self.progress(title) if self.ranks.is_main else silent_stage(title)

    def _pairs(self, keys: Sequence[int], near: NearestMatches, pool: Pool) -> Tensor | None:
        """The samples most like copies, each followed by its nearest training image."""
        if not (pool.images and self.samples.images):
            return None
        ratio = near.distance[:, 0] / near.distance[:, 1].clamp(min=1e-300)
        shown = ratio.argsort()[:_SHOWN_PAIRS]
        samples = self.samples.take([keys[i] for i in shown.tolist()])
        return torch.stack([samples, pool.take(near.index[shown, 0]).to(samples)], 1).flatten(0, 1)


@arithmetic("float32")  # features are compared with those of others: whatever samples are made in, TF32 is off
def evaluate(
    samples: Scored,
    reference: Compared | None = None,
    *,
    features: Spaces = (),
    metrics: Collection[str] = METRICS,
    count: int | None = None,
    seeds: Sequence[int] | None = None,
    repeats: int = 1,
    held_out: Compared | None = None,
    weights: Path | None = None,
    trusted: bool = False,
    keep: str | Path | None = None,
    batch_size: int = 64,
    ranks: Ranks | None = None,
    progress: StageProgress = silent_stage,
    on_table: Callable[[ScoreTable], object] = lambda table: None,
) -> Scores:
    """Score samples, or a run whose samples are made first, against a reference.

    >>> scores = evaluate("runs/digits-stf", features=["classifier", "pixels"], repeats=3)  # doctest: +SKIP
    >>> scores["frechet"].mean  # doctest: +SKIP

    Args:
        samples: a run (folder, checkpoint, opened run, or a `SamplingPlan` for another sampler), or samples: a
            folder of images, an archive or data of any kind as a path, a pool, or a tensor (n, *D).
        reference: what to compare with: data of any kind as a path, a pool or a tensor, or statistics; by default the
            data that the run was trained on. A `Reference` keeps what was computed of it for the next call.
        features: feature spaces: "classifier", "pixels", "inception", the file of an exported network, or `Features`;
            by default the classifier for labelled images and pixels for other data.
        metrics: names of the metrics to compute: frechet, kernel, precision_recall, inception_score and memorisation.
        count: number of samples; by default all, or for a run as many as the reference holds, up to 50,000.
        seeds: seeds of a run's samples; by default 0 to count - 1.
        repeats: repeats, each with new samples of the run from other seeds.
        held_out: data that the run was not trained on, for the memorisation scores; by default those that it held out.
        weights: file with Inception's weights.
        trusted: also open feature files that can run code.
        keep: folder that keeps a run's samples for the next call; by default `evaluated` in the run's folder.
        batch_size: number of samples that are made, or whose features are computed, in one call.
        ranks: the ranks that share the work, all of which must call this; by default this process alone.
        progress: opens a progress callback for each stage, given its title.
        on_table: called on the main rank with each table as soon as it is computed.

    Returns:
        The scores; without tables on all ranks but the main one.

    Raises:
        ConfigError: the arguments contradict each other, or the data of the run have changed.
        ValueError: something cannot be read or compared, or a score is not finite.
        OSError: samples cannot be written.
    """
    if unknown := set(metrics) - set(METRICS):
        raise ValueError(f"unknown metric {', '.join(sorted(unknown))}; choose from {', '.join(METRICS)}")
    plan = _plan(samples)
    ranks = ranks or Ranks(plan.device if plan else torch.device("cpu"))
    refuse_if(
        (count is not None and seeds is not None, "count and seeds exclude each other; pass one of them"),
        (plan is None and seeds is not None, "seeds are for runs; these samples exist already"),
        (plan is None and repeats > 1, f"{repeats} repeats need new samples for each repeat; pass a run"),
        (plan is None and reference is None, "there is no reference; pass data, statistics or their path"),
    )
    source = None
    if plan is None:
        source = open_samples(samples, progress).first(count)
        shape, images, name = source.shape, source.images, str(source.metadata["name"])
    else:
        shape, images, name = plan.trained.shape, plan.images, plan.name
    if reference is not None:
        compared = open_reference(reference, progress)
    else:
        assert plan is not None
        compared = training_reference(plan, progress)
    other = None if held_out is None else open_reference(held_out, progress)
    for each in (compared, other):
        if each and each.pool and each.pool.shape != shape:
            raise ConfigError(f"samples of shape {shape} cannot be compared with {each.pool} from {each.name}")
    if other and not (other.pool and compared.pool):
        raise ConfigError("--held-out needs data, not statistics, both itself and as --reference")
    floats = name if not images else compared.name if compared.pool and not compared.pool.images else None
    spaces = open_features(features, compared, floats, ranks, weights=weights, trusted=trusted, progress=progress)
    if plan:
        usual = range(count or min(compared.n or _USUAL_SAMPLES, _USUAL_SAMPLES))
        all_seeds = _repeated_seeds(usual if seeds is None else seeds, repeats)
        source = sample_run(plan, all_seeds, None if keep is None else Path(keep), batch_size, ranks, progress)
    assert source is not None
    held_out_pool = other.pool if other else compared.held_out
    evaluation = Evaluation(source, compared, held_out_pool, spaces, metrics, ranks, batch_size, progress)
    tables = []
    for table in evaluation.tables():
        on_table(table)
        tables.append(table)
    return Scores(tables)


@arithmetic("float32")
def feature_statistics(
    samples: str | Path | Pool | Tensor,
    *,
    features: Spaces = (),
    count: int | None = None,
    weights: Path | None = None,
    trusted: bool = False,
    batch_size: int = 64,
    ranks: Ranks | None = None,
    progress: StageProgress = silent_stage,
) -> Statistics | None:
    """Mean and covariance of the features of samples, which can be the reference of an evaluation.

    Args:
        samples: data of any kind as a path, a pool, or a tensor (n, *D).
        features: one feature space, as for `evaluate`.
        count: number of samples; by default all.
        weights: file with Inception's weights.
        trusted: also open feature files that can run code.
        batch_size: number of samples whose features are computed in one call.
        ranks: the ranks that share the work, all of which must call this; by default this process alone.
        progress: opens a progress callback for each stage.

    Returns:
        The statistics; None on all ranks but the main one.

    Raises:
        ValueError: something cannot be read, or there is more than one feature space.
    """
    ranks = ranks or Ranks(torch.device("cpu"))
    source = open_samples(samples, progress).first(count)
    name = source.metadata["name"]
    base, floats = Reference(name, source.pool), None if source.images else name
    spaces = open_features(features, base, floats, ranks, weights=weights, trusted=trusted, progress=progress)
    if len(spaces) > 1:
        raise ConfigError(f"statistics are of one kind of features, not {len(spaces)}")
    tables = list(Evaluation(source, None, None, spaces, (), ranks, batch_size, progress).tables())
    return tables[0].statistics if tables else None


def _plan(samples: Scored) -> SamplingPlan | None:
    """The plan by which samples are made; None if they exist already."""
    if isinstance(samples, SamplingPlan):
        return samples
    if isinstance(samples, TrainedRun) or (isinstance(samples, str | Path) and is_run(Path(samples))):
        return SamplingPlan.for_run(samples)
    return None


def _repeated_seeds(first: Sequence[int], repeats: int) -> list[list[int]]:
    """Seeds of each repeat: those of the first, shifted so that no seed occurs twice."""
    span = max(first) + 1 - min(first)
    return [[seed + repeat * span for seed in first] for repeat in range(repeats)]
