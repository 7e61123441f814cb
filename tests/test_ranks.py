"""Several ranks do together what one does alone, but for the order in which numbers are added."""

import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from stablefield import (
    EDM,
    VE,
    EDMWeight,
    FullDataset,
    LogNormal,
    Objective,
    Pool,
    Preconditioned,
    ReferenceBatch,
    TrainState,
    UNet,
)
from stablefield.checkpoint import read
from stablefield.config import Config, override, resolve
from stablefield.data import Shuffled
from stablefield.engine import Descent, train
from stablefield.engine.fit import descent_of, fit
from stablefield.neighbours import nearest
from stablefield.pruned import PrunedDataset
from stablefield.ranks import Ranks, _forget, joined
from stablefield.run import Folder, assemble
from stablefield.schedule import LearningRate
from stablefield.shards import Shards
from stablefield.times import Stratified

POOL = Pool(torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3)


def losses(ranks: Ranks, *, steps: int = 6, micro_batch: int | None = None) -> torch.Tensor:
    """The loss of every row of the first steps, (steps, rows), and the gradient's norms as one more column."""
    torch.manual_seed(1 + ranks.rank)  # weights differ at first: those of the first rank must win
    denoiser = Preconditioned(UNet(POOL.shape, label_dim=3, channels=8), VE(), EDM(), 3)
    objective = Objective(Stratified(LogNormal()), ReferenceBatch(POOL, 16), EDMWeight())
    batches = Shuffled(POOL, 16, seed=3, rank=ranks.rank, ranks=ranks.total)
    descent = Descent(LearningRate(1e-3), clip=1.0, micro_batch=micro_batch)
    found = []
    for step in train(
        TrainState(denoiser), objective, batches, images=16 * steps, seed=3, descent=descent, ranks=ranks
    ):
        found.append(torch.cat([ranks.gather(step.report.each), step.gradient_norm.reshape(1)]))
    return torch.stack(found)


def together(ranks: int, out: Path, what: str = "losses", **options: object) -> torch.Tensor:
    """The same by so many processes."""
    done = launched(ranks, out, what, **options)
    assert done.returncode == 0, done.stderr
    return torch.load(out / "found.pt")


def launched(ranks: int, out: Path, what: str, **options: object) -> subprocess.CompletedProcess[str]:
    said = ", ".join(f"{name}={value!r}" for name, value in options.items())
    script = (
        "import sys, torch, weakref; sys.path.insert(0, sys.argv[1]); import test_ranks as t\n"
        "from stablefield.ranks import joined\n"
        "torch.set_num_threads(1)\n"
        "try:\n"
        "    with joined(torch.device('cpu')) as ranks:\n"
        "        group = weakref.ref(torch.distributed.group.WORLD)\n"
        f"        found = t.{what}(ranks, {said})\n"
        "        assert ranks.any(ranks.rank == 1) and not ranks.any(False)\n"
        "        if ranks.first: torch.save(found, sys.argv[2])\n"
        "finally:\n"
        "    assert group() is None, 'the group outlives its end'\n"
    )
    (out / "script.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*launch, str(out / "script.py"), str(Path(__file__).parent), str(out / "found.pt")],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_two_ranks_lose_what_one_does(tmp_path):
    alone = losses(Ranks(torch.device("cpu")))
    torch.testing.assert_close(together(2, tmp_path, micro_batch=3), alone, rtol=1e-5, atol=1e-6)


def fail_at_the_end(ranks: Ranks) -> None:
    """Train, and fail on the first rank, where the module that holds all ranks together is at hand."""
    module = ranks.wrap(torch.nn.Linear(2, 2))
    module(torch.ones(3, 2)).sum().backward()

    def act() -> None:
        raise OSError("no room")

    try:
        ranks.lead(act)
    except OSError as error:
        raise ValueError("it could not be written") from error


def test_a_group_ends_with_its_ranks_even_if_they_fail(tmp_path):
    done = launched(2, tmp_path, "fail_at_the_end")
    assert done.returncode != 0
    assert done.stderr.count("ValueError: it could not be written") == 1, done.stderr
    assert "outlives its end" not in done.stderr
    assert "SIGABRT" not in done.stderr


def test_errors_that_are_each_others_cause_are_forgotten_once():
    def fail():
        kept = torch.ones(3)
        met.append(weakref.ref(kept))
        raise OSError("no room")

    met = []
    with pytest.raises(OSError, match="no room") as raised:
        fail()
    # as `raise error.__cause__` leaves them
    raised.value.__context__ = ValueError()
    raised.value.__context__.__cause__ = raised.value
    assert met[0]() is not None
    _forget(raised.value)
    assert met[0]() is None


@pytest.mark.slow
def test_four_ranks_lose_what_one_does(tmp_path):
    alone = losses(Ranks(torch.device("cpu")))
    torch.testing.assert_close(together(4, tmp_path), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_rows_of_all_ranks_are_the_batch(ranks):
    whole = Shuffled(POOL, 16, seed=3)(40)  # beyond the end of an epoch
    parts = [Shuffled(POOL, 16, seed=3, rank=rank, ranks=ranks)(40) for rank in range(ranks)]
    for name in ("x", "index", "number", "label"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_ranks_that_cannot_share_a_batch_evenly_are_refused():
    with pytest.raises(ValueError, match="16 cannot be shared evenly by 3"):
        Shuffled(POOL, 16, ranks=3)


def test_alone_everything_is_the_identity(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(torch.device("cpu")) as ranks:
        rows, module = torch.arange(3), torch.nn.Linear(1, 1)
        assert ranks.gather(rows) is rows
        assert ranks.wrap(module) is module
        assert ranks.any(True)
        assert not ranks.any(False)
        ranks.wait()


def exact_means(ranks: Ranks, sigma: float) -> torch.Tensor:
    """The pruned exact target of 32 rows, of which each rank asks for its own; the data are shared out."""
    shards = Shards(ranks.rank, ranks.total, ranks.gather)
    g = torch.Generator().manual_seed(5)
    index = torch.randint(50, (32,), generator=g)
    noise, level = torch.randn(32, *POOL.shape, generator=g), torch.full((32,), sigma)
    noisy = VE().perturb(POOL.take(index), level, noise, index=index, label=POOL.label(index))
    target = PrunedDataset(POOL, lambda label: nearest(POOL, label), dims=8, shards=shards)
    return ranks.gather(target(noisy.rows(shards.mine(32))).mean)


@pytest.mark.slow
def test_two_ranks_that_share_the_data_out_are_taught_what_one_is(tmp_path):
    for sigma in (0.5, 2.0, 8.0):
        alone = exact_means(Ranks(torch.device("cpu")), sigma)
        torch.testing.assert_close(together(2, tmp_path, "exact_means", sigma=sigma), alone, rtol=0, atol=1e-6)


# ---- references that no rank holds alone

DIGITS = ["network.kind=mlp", "network.width=16", "network.layers=1", "training.batch_size=32", "training.images=192"]
SHARED_OUT = {
    "pruned": ["target.kind=pruned"],
    "full": ["target.kind=full"],
    "labels": ["target.kind=pruned", "training.conditional=true", "training.label_dropout=0.3"],
    "full labels": ["target.kind=full", "training.conditional=true"],
    "mirrored": ["target.kind=pruned", "augmentation.kind=mirror"],
    "told": ["target.kind=pruned", "augmentation.kind=edm", "augmentation.p=0.3"],
}


def shared_out(kind: str) -> Config:
    return resolve(override({}, [*DIGITS, *SHARED_OUT[kind], "target.sharded=true"]))


def sharded_losses(ranks: Ranks, kind: str) -> torch.Tensor:
    """Losses and shares (ESS) of every row, from a configuration with the references shared out; micro-batches of 5."""
    config = shared_out(kind)
    parts = assemble(config, ranks=ranks)
    training = config.training
    descent = Descent(descent_of(training).rate, micro_batch=5)
    found = []
    for step in train(
        TrainState(parts.denoiser),
        parts.objective,
        parts.batches,
        images=training.images,
        seed=training.seed,
        descent=descent,
        ranks=ranks,
    ):
        found.append(ranks.gather(torch.stack([step.report.each, step.report.ess], 1)))
    own = parts.objective.target.own
    assert len(own) == len(Shards(ranks.rank, ranks.total).own(parts.pool)) <= -(-len(parts.pool) // ranks.total)
    return torch.stack(found)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k != "labels")) for k in SHARED_OUT])
def test_two_ranks_with_half_of_the_references_each_lose_what_one_with_all_does(tmp_path, kind):
    alone = sharded_losses(Ranks(torch.device("cpu")), kind)
    assert (alone[:, :, 1] > 1.01).any()  # targets that are more than the source
    found = together(2, tmp_path, "sharded_losses", kind=kind)
    torch.testing.assert_close(found[:, :, 0], alone[:, :, 0], rtol=1e-5, atol=1e-6)
    # rows that are answered together share their number of digits, and log weights are right to about 1e-6
    torch.testing.assert_close(found[:, :, 1], alone[:, :, 1], rtol=3e-5, atol=0)


def test_alone_shared_out_references_are_those_of_the_run_without():
    plain = resolve(override({}, [*DIGITS, *SHARED_OUT["pruned"]]))
    parts = [assemble(config) for config in (plain, shared_out("pruned"))]
    one, other = (part.objective.target for part in parts)
    assert one.shards.total == other.shards.total == 1
    assert other.own is other.pool
    noisy = VE().perturb(
        parts[0].pool.take(torch.arange(8)), torch.full((8,), 2.0), torch.zeros(8, 1, 8, 8), index=torch.arange(8)
    )
    assert torch.equal(one(noisy).mean, other(noisy).mean)


def test_ranks_that_ask_about_unequally_many_rows_are_told():
    x = POOL.take(torch.arange(3))
    noisy = VE().perturb(x, torch.ones(3), torch.zeros_like(x), index=torch.arange(3))
    shards = Shards(0, 2, lambda rows: torch.cat([rows, rows + 1]))
    for target in (FullDataset(POOL, shards=shards), PrunedDataset(POOL, shards=shards)):
        with pytest.raises(ValueError, match=r"equally many rows, and not \[3, 4\]"):
            target(noisy)


def test_more_ranks_than_members_are_refused():
    with pytest.raises(ValueError, match="50 members cannot be shared out among 51 ranks"):
        Shards(0, 51).own(POOL)


DYING = ["training.images=1000000", "training.save_every=64", "training.log_every=32"]


def die_in_a_target(ranks: Ranks, folder: str, gathers: int, victim: int) -> torch.Tensor:
    """Train until one rank is killed before its n-th exchange within a target."""
    config = resolve(override(shared_out("pruned").sections, DYING))
    parts = assemble(config, ranks=ranks)
    said = 0

    def gather(rows: torch.Tensor) -> torch.Tensor:
        nonlocal said
        said += 1
        if said == gathers and ranks.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return ranks.gather(rows)

    object.__setattr__(parts.objective.target.shards, "gather", gather)
    fit(config, parts, Folder(Path(folder)), ranks=ranks)
    raise AssertionError("nobody died")


@pytest.mark.slow
@pytest.mark.parametrize(("gathers", "victim"), [(100, 0), (103, 1), (105, 0), (108, 1)])
def test_a_rank_that_dies_within_a_target_is_missed_and_the_run_goes_on(tmp_path, gathers, victim):
    folder = tmp_path / "run"
    done = launched(2, tmp_path, "die_in_a_target", folder=str(folder), gathers=gathers, victim=victim)
    assert done.returncode != 0
    # the survivor notices, unless torchrun was quicker and has ended it
    told = f"ConnectionError: rank {1 - victim} of 2 has lost the others"
    assert told in done.stderr or "closing signal SIGTERM" in done.stderr, done.stderr
    kept = read(Folder(folder).checkpoint).images
    assert kept > 0
    config = resolve(override(shared_out("pruned").sections, [*DYING, f"training.images={kept + 64}"]))
    assert fit(config, assemble(config), Folder(folder)) == 0
    assert read(Folder(folder).checkpoint).images == kept + 64


@pytest.mark.slow
def test_the_command_line_shares_references_out(tmp_path):
    settings = [*DIGITS, "training.log_every=32", "target.kind=pruned", "target.sharded=true"]
    said = [part for setting in settings for part in ("--set", setting)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "stablefield", "train", "--out"]
    done = subprocess.run(
        [*launch, *command, str(tmp_path / "two"), *said], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sharded=True" in done.stdout
    config = resolve(override({}, settings))
    fit(config, assemble(config), Folder(tmp_path / "one"))
    one, two = (Folder(tmp_path / name).history() for name in ("one", "two"))
    assert len(one) == 6
    for mine, theirs in zip(one, two, strict=True):
        for name in ("Loss/loss", "Target/ess", "Loss/gradient_norm"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5)
    # how the references are shared out is no other run
    more = ["--resume", str(tmp_path / "two"), "--set", "target.sharded=false", "--set", "training.images=256"]
    done = subprocess.run(
        [sys.executable, *command[:-1], *more],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
