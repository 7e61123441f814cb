"""Several ranks do together what one does alone, but for the order in which numbers are added."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stablefield import EDM, VE, EDMWeight, LogNormal, Objective, Pool, Preconditioned, ReferenceBatch, TrainState, UNet
from stablefield.data import Shuffled
from stablefield.engine import Descent, train
from stablefield.neighbours import nearest
from stablefield.pruned import PrunedDataset
from stablefield.ranks import Ranks, joined
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


def together(ranks: int, out: Path, what: str = "losses", **options: float) -> torch.Tensor:
    """The same by so many processes."""
    said = ", ".join(f"{name}={value}" for name, value in options.items())
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_ranks as t\n"
        "from stablefield.ranks import joined\n"
        "torch.set_num_threads(1)\n"
        "with joined(torch.device('cpu')) as ranks:\n"
        f"    found = t.{what}(ranks, {said})\n"
        "    assert ranks.any(ranks.rank == 1) and not ranks.any(False)\n"
        "    if ranks.first: torch.save(found, sys.argv[2])\n"
    )
    (out / "script.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    subprocess.run(
        [*launch, str(out / "script.py"), str(Path(__file__).parent), str(out / "found.pt")],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return torch.load(out / "found.pt")


def test_two_ranks_lose_what_one_does(tmp_path):
    alone = losses(Ranks(torch.device("cpu")))
    torch.testing.assert_close(together(2, tmp_path, micro_batch=3), alone, rtol=1e-5, atol=1e-6)


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
