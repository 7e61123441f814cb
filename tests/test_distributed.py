"""Several ranks compute what a single rank computes, up to the order of summation."""

import os
import signal
import socket
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from noisy_data import images
from processes import forked

from stablefield import VE, Objective, Pool, Preconditioned, STFTarget, TrainState
from stablefield.build import build
from stablefield.checkpoint import read
from stablefield.config import Config, override, resolve
from stablefield.data import ShuffledBatches
from stablefield.distributed import Ranks, _forget, _warn_of_shared_store, process_group, refuse_accelerate_settings
from stablefield.engine import Optimization, train
from stablefield.engine.fit import fit
from stablefield.engine.loop import refuse_unused_parameters
from stablefield.engine.probing import RunProbes
from stablefield.engine.session import initial_state
from stablefield.evaluate import Reference
from stablefield.evaluate.spaces import open_features
from stablefield.networks import UNet
from stablefield.objective import EDMWeight
from stablefield.preconditioning import EDMPreconditioning
from stablefield.run import RunFolder
from stablefield.schedule import LearningRate
from stablefield.targets import DSMTarget, ExactTarget, Prefetched, Shard, Sharded
from stablefield.targets.isolation import nearest_distances
from stablefield.times import LogNormal, Stratified

POOL = Pool(torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3)


def losses(ranks: Ranks, *, steps: int = 6, micro_batch_size: int | None = None) -> torch.Tensor:
    """Losses of all examples of the first steps (steps, batch), with the norm of the gradient as one more column."""
    torch.manual_seed(1 + ranks.rank)  # the ranks start with different weights: those of the main rank must be used
    denoiser = Preconditioned(UNet(POOL.shape, num_classes=3, channels=8), VE(), EDMPreconditioning(), 3)
    objective = Objective(Stratified(LogNormal()), STFTarget(POOL, 16), EDMWeight())
    batches = ShuffledBatches(POOL, 16, seed=3, rank=ranks.rank, world_size=ranks.world_size)
    optimization = Optimization(LearningRate(1e-3), gradient_clip=1.0, micro_batch_size=micro_batch_size)
    results = []
    state = TrainState(denoiser)
    for step in train(state, objective, batches, images=16 * steps, seed=3, optimization=optimization, ranks=ranks):
        results.append(torch.cat([ranks.all_gather(step.report.losses), step.gradient_norm.reshape(1)]))
    return torch.stack(results)


def probed_run(ranks: Ranks) -> torch.Tensor:
    """Excess and floors of an untrained network at the probes of a run."""
    config = resolve({"network": {"kind": "mlp", "width": 8, "layers": 1}, "training": {"probes": 5}})
    components = build(config, ranks=ranks)
    line = RunProbes(config, components, ranks)(initial_state(config, components))
    return torch.tensor([line[key] for key in sorted(line) if not key.startswith("timing")])


def adapted_run(ranks: Ranks) -> torch.Tensor:
    """Probabilities of the ranges of the noise level after some steps of adaptive noise."""
    raw = {"network": {"kind": "mlp", "width": 8, "layers": 1}, "times": {"kind": "adaptive", "every": 64}}
    config = resolve(raw | {"training": {"batch_size": 32, "images": 320}})
    components = build(config, ranks=ranks)
    state = initial_state(config, components)
    for _ in train(state, components.objective, components.batches, images=320, ranks=ranks):
        pass
    assert state.adaptation is not None
    return state.adaptation.shares


def on_ranks(
    world_size: int, out: Path, function: Callable[..., torch.Tensor] = losses, **options: object
) -> torch.Tensor:
    """The result of a function on the main rank when it is called on several ranks."""
    codes, printed = on_forks(world_size, out, function, **options)
    assert codes == [0] * world_size, printed
    return torch.load(out / "result.pt")


def on_forks(world_size: int, out: Path, function: Callable, **options: object) -> tuple[list[int], str]:
    """Call a function on several ranks, which are forks of this process: their exit codes, and what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world_size)}
    forks = [forked(partial(_one_rank, address, rank, out, function, options)) for rank in range(world_size)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) for fork in forks]
    return codes, "".join((out / f"{rank}.txt").read_text() for rank in range(world_size))


def _one_rank(address: dict[str, str], rank: int, out: Path, function: Callable, options: dict[str, object]) -> None:
    """Call the function in a process group, write what is printed to a file, and end this process."""
    signal.alarm(120)
    code = 0
    with (out / f"{rank}.txt").open("w") as printed:
        os.dup2(printed.fileno(), 2)
        try:
            os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=address["WORLD_SIZE"])
            with process_group(torch.device("cpu")) as ranks:
                group = weakref.ref(torch.distributed.group.WORLD)
                result = function(ranks, **options)
                if ranks.is_main:
                    torch.save(result, out / "result.pt")
        except BaseException:
            printed.write(traceback.format_exc())
            code = 1
        if group() is not None:
            printed.write("the process group still exists")
            code = 2
    os._exit(code)


def launched(world_size: int, out: Path, function: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Call a function of this module on several ranks of torchrun, and save the result of the main rank."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    script = (
        "import sys, torch, weakref; sys.path.insert(0, sys.argv[1]); import test_distributed as t\n"
        "from stablefield.distributed import process_group\n"
        "torch.set_num_threads(1)\n"
        "try:\n"
        "    with process_group(torch.device('cpu')) as ranks:\n"
        "        group = weakref.ref(torch.distributed.group.WORLD)\n"
        f"        result = t.{function}(ranks, {arguments})\n"
        "        assert ranks.any(ranks.rank == 1) and not ranks.any(False)\n"
        "        if ranks.is_main: torch.save(result, sys.argv[2])\n"
        "finally:\n"
        "    assert group() is None, 'the process group still exists'\n"
    )
    (out / "script.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    return subprocess.run(
        [*launch, str(out / "script.py"), str(Path(__file__).parent), str(out / "result.pt")],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_two_ranks_have_the_losses_of_one(tmp_path):
    single = losses(Ranks(torch.device("cpu")))
    torch.testing.assert_close(on_ranks(2, tmp_path, micro_batch_size=3), single, rtol=1e-5, atol=1e-6)


def fail_at_the_end(ranks: Ranks) -> None:
    """Fail on the main rank, in a frame that holds a module wrapped for all ranks."""
    module = ranks.wrap(torch.nn.Linear(2, 2))
    module(torch.ones(3, 2)).sum().backward()

    def fail() -> None:
        raise OSError("no space left")

    try:
        ranks.on_main(fail)
    except OSError as error:
        raise ValueError("cannot write") from error


def test_the_process_group_is_destroyed_even_if_ranks_fail(tmp_path):
    codes, printed = on_forks(2, tmp_path, fail_at_the_end)
    assert codes == [1, 1], printed
    assert printed.count("ValueError: cannot write") == 1, printed


@pytest.mark.slow
def test_ranks_of_torchrun_that_fail_print_one_error(tmp_path):
    done = launched(2, tmp_path, "fail_at_the_end")
    assert done.returncode != 0
    assert done.stderr.count("ValueError: cannot write") == 1, done.stderr
    assert "still exists" not in done.stderr
    assert "SIGABRT" not in done.stderr


def test_frames_of_errors_that_are_each_others_cause_are_cleared_once():
    def fail():
        value = torch.ones(3)
        references.append(weakref.ref(value))
        raise OSError("no space left")

    references = []
    with pytest.raises(OSError, match="no space left") as raised:
        fail()
    # as `raise error.__cause__` leaves them
    raised.value.__context__ = ValueError()
    raised.value.__context__.__cause__ = raised.value
    assert references[0]() is not None
    _forget(raised.value)
    assert references[0]() is None


@pytest.mark.slow
def test_four_ranks_have_the_losses_of_one(tmp_path):
    single = losses(Ranks(torch.device("cpu")))
    torch.testing.assert_close(on_ranks(4, tmp_path), single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_parts_of_all_ranks_make_the_batch(world_size):
    whole = ShuffledBatches(POOL, 16, seed=3)(40)  # beyond the end of an epoch
    parts = [ShuffledBatches(POOL, 16, seed=3, rank=rank, world_size=world_size)(40) for rank in range(world_size)]
    for name in ("x", "index", "image_number", "label"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_a_batch_that_cannot_be_divided_evenly_is_refused():
    with pytest.raises(ValueError, match="16 cannot be divided evenly among 3 ranks"):
        ShuffledBatches(POOL, 16, world_size=3)


def test_with_a_single_rank_every_operation_is_the_identity(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(torch.device("cpu")) as ranks:
        values, module = torch.arange(3), torch.nn.Linear(1, 1)
        assert ranks.all_gather(values) is values
        assert ranks.wrap(module) is module
        assert ranks.any(True)
        assert not ranks.any(False)
        ranks.barrier()


def exact_means(ranks: Ranks, sigma: float) -> torch.Tensor:
    """Exact targets of 32 examples, computed by each rank for its own part, with sharded data."""
    shard = Shard(ranks.rank, ranks.world_size, ranks.all_gather)
    g = torch.Generator().manual_seed(5)
    index = torch.randint(50, (32,), generator=g)
    noise, level = torch.randn(32, *POOL.shape, generator=g), torch.full((32,), sigma)
    noisy = VE().perturb(POOL.take(index), level, noise, index=index, label=POOL.label(index))
    exact = ExactTarget(POOL, lambda label: nearest_distances(POOL, label), projection_dims=8)
    own = torch.arange(32).chunk(ranks.world_size)[ranks.rank]
    return ranks.all_gather(Sharded(exact, shard)(noisy.select(own)).mean)


def test_sharded_exact_targets_on_two_ranks_equal_those_on_one(tmp_path):
    for sigma in (0.5, 2.0, 8.0):
        single = exact_means(Ranks(torch.device("cpu")), sigma)
        torch.testing.assert_close(on_ranks(2, tmp_path, exact_means, sigma=sigma), single, rtol=0, atol=1e-6)


# ---- targets of sharded data

DIGITS = ["network.kind=mlp", "network.width=16", "network.layers=1", "training.batch_size=32", "training.images=192"]
SHARDED = {
    "exact": ["target.kind=exact"],
    "streamed": ["target.kind=exact", "target.missing_mass=0"],
    "labels": ["target.kind=exact", "training.conditional=true", "training.label_dropout=0.3"],
    "streamed labels": ["target.kind=exact", "target.missing_mass=0", "training.conditional=true"],
    "mirrored": ["target.kind=exact", "augmentation.kind=mirror"],
    "augmentation labels": ["target.kind=exact", "augmentation.kind=edm", "augmentation.p=0.3"],
}


def sharded(kind: str) -> Config:
    return resolve(override({}, [*DIGITS, *SHARDED[kind], "training.target_sharding=true"]))


def sharded_losses(ranks: Ranks, kind: str) -> torch.Tensor:
    """Losses and effective sample sizes of all examples, with sharded data and micro-batches of 5."""
    config = sharded(kind)
    components = build(config, ranks=ranks)
    training = config.training
    optimization = Optimization(training.rate, micro_batch_size=5)
    results = []
    for step in train(
        TrainState(components.denoiser),
        components.objective,
        components.batches,
        images=training.images,
        seed=training.seed,
        optimization=optimization,
        ranks=ranks,
    ):
        results.append(ranks.all_gather(torch.stack([step.report.losses, step.report.ess], 1)))
    target, pool = components.objective.target, components.pool
    assert isinstance(target, Prefetched)
    assert isinstance(target.target, Sharded)
    own = target.target._own_part.own
    assert len(own) == len(Shard(ranks.rank, ranks.world_size).own(pool)) <= -(-len(pool) // ranks.world_size)
    return torch.stack(results)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k != "labels")) for k in SHARDED])
def test_two_ranks_with_sharded_data_have_the_losses_of_one_rank(tmp_path, kind):
    single = sharded_losses(Ranks(torch.device("cpu")), kind)
    assert (single[:, :, 1] > 1.01).any()  # some targets differ from the source
    result = on_ranks(2, tmp_path, sharded_losses, kind=kind)
    torch.testing.assert_close(result[:, :, 0], single[:, :, 0], rtol=1e-5, atol=1e-6)
    # examples computed together use the same number of digits, and log weights are accurate to about 1e-6
    torch.testing.assert_close(result[:, :, 1], single[:, :, 1], rtol=3e-5, atol=0)


def test_sharding_changes_nothing_on_a_single_rank():
    plain = resolve(override({}, [*DIGITS, *SHARDED["exact"]]))
    components = [build(config) for config in (plain, sharded("exact"))]
    one, other = (each.objective.target for each in components)
    assert not isinstance(one.target, Sharded)
    assert other.target.shard.total == 1
    assert other.target._own_part.own is other.target._own_part.pool
    noisy = VE().perturb(
        components[0].pool.take(torch.arange(8)), torch.full((8,), 2.0), torch.zeros(8, 1, 8, 8), index=torch.arange(8)
    )
    assert torch.equal(one(noisy).mean, other(noisy).mean)


def test_ranks_with_batches_of_different_sizes_are_refused():
    x = POOL.take(torch.arange(3))
    noisy = VE().perturb(x, torch.ones(3), torch.zeros_like(x), index=torch.arange(3))
    shard = Shard(0, 2, lambda values: torch.cat([values, values + 1]))
    for missing_mass in (0.0, 1e-8):
        with pytest.raises(ValueError, match=r"equally many examples each, not \[3, 4\]"):
            Sharded(ExactTarget(POOL, missing_mass=missing_mass), shard)(noisy)


def test_more_ranks_than_data_points_are_refused():
    with pytest.raises(ValueError, match="50 data points cannot be sharded over 51 ranks"):
        Shard(0, 51).own(POOL)


DYING = ["training.images=1000000", "training.save_every=64", "training.log_every=32"]


def die_in_a_target(ranks: Ranks, folder: str, gathers: int, victim: int) -> torch.Tensor:
    """Train until one rank is killed before its n-th collective operation within a target."""
    config = resolve(override(sharded("exact").sections, DYING))
    components = build(config, ranks=ranks)
    calls = 0

    def gather(values: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == gathers and ranks.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return ranks.all_gather(values)

    object.__setattr__(components.objective.target.target.shard, "gather", gather)
    fit(config, components, RunFolder(Path(folder)), ranks=ranks)
    raise AssertionError("no rank was killed")


@pytest.mark.slow
@pytest.mark.parametrize(("gathers", "victim"), [(100, 0), (103, 1), (105, 0), (108, 1)])
def test_a_run_resumes_after_a_rank_is_killed_within_a_target(tmp_path, gathers, victim):
    folder = tmp_path / "run"
    done = launched(2, tmp_path, "die_in_a_target", folder=str(folder), gathers=gathers, victim=victim)
    assert done.returncode != 0
    # the survivor reports it, unless torchrun ends it first
    message = f"ConnectionError: rank {1 - victim} of 2 has lost the others"
    assert message in done.stderr or "closing signal SIGTERM" in done.stderr, done.stderr
    saved = read(RunFolder(folder).checkpoint).images
    assert saved > 0
    config = resolve(override(sharded("exact").sections, [*DYING, f"training.images={saved + 64}"]))
    assert fit(config, build(config), RunFolder(folder)) == 0
    assert read(RunFolder(folder).checkpoint).images == saved + 64


@pytest.mark.slow
def test_the_command_line_shards_data(tmp_path):
    settings = [*DIGITS, "training.log_every=32", "target.kind=exact", "training.target_sharding=true"]
    flags = [part for setting in settings for part in ("--set", setting)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "stablefield", "train", "--out"]
    done = subprocess.run(
        [*launch, *command, str(tmp_path / "two"), *flags], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Sharded(target=" in done.stdout
    config = resolve(override({}, settings))
    fit(config, build(config), RunFolder(tmp_path / "one"))
    one, two = (RunFolder(tmp_path / name).history() for name in ("one", "two"))
    assert len(one) == 6
    for of_one, of_two in zip(one, two, strict=True):
        for name in ("loss/loss", "target/ess", "loss/gradient_norm"):
            assert of_two[name] == pytest.approx(of_one[name], rel=1e-5)
    # the sharding of the data can be changed when resuming
    more = [
        "--resume",
        str(tmp_path / "two"),
        "--set",
        "training.target_sharding=false",
        "--set",
        "training.images=256",
    ]
    done = subprocess.run(
        [sys.executable, *command[:-1], *more],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_parameters_without_gradient_are_named_before_the_first_step():
    class Unused(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = torch.nn.Conv2d(1, 1, 1), torch.nn.Linear(2, 2)
            self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)

        def forward(self, x, c_noise, label_one_hot=None, augment_label=None):
            return self.used(x)

    denoiser = Preconditioned(Unused(), VE(), EDMPreconditioning())
    x, index = POOL.take(torch.arange(4)), torch.arange(4)
    noisy = VE().perturb(x, torch.ones(4), torch.zeros_like(x), index=index)
    objective = Objective(LogNormal(), DSMTarget(), EDMWeight())
    with pytest.raises(ValueError, match=r"^2 parameters .*: network.spare.weight, network.spare.bias;"):
        refuse_unused_parameters(denoiser, objective, (noisy, DSMTarget()(noisy)))
    assert all(p.grad is None for p in denoiser.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MIXED_PRECISION": "bf16"}, "mixed_precision=bf16, but the precision is float32"),
        ({"GRADIENT_ACCUMULATION_STEPS": "4"}, "set training.micro_batch_size"),
        ({"DYNAMO_BACKEND": "INDUCTOR"}, "set training.compile=true"),
        ({"USE_DEEPSPEED": "true"}, "DEEPSPEED, which is not supported"),
        ({"USE_FSDP": "true"}, "FSDP, which is not supported"),
    ],
)
def test_settings_of_accelerate_that_would_be_ignored_are_refused(settings, message):
    usual = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "GRADIENT_ACCUMULATION_STEPS": "1", "USE_CPU": "true"}
    environment = {f"ACCELERATE_{name}": value for name, value in usual.items()}
    refuse_accelerate_settings(environment, "float32")
    refuse_accelerate_settings(environment | {"ACCELERATE_MIXED_PRECISION": "bf16"}, "bfloat16")
    with pytest.raises(ValueError, match=message):
        refuse_accelerate_settings(
            environment | {f"ACCELERATE_{name}": value for name, value in settings.items()}, "float32"
        )


@pytest.mark.parametrize(
    "changed", [{}, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, {"RANK": "1"}, {"TORCHELASTIC_MAX_RESTARTS": "0"}]
)
def test_restarts_with_a_shared_store_are_warned_of_on_one_rank(changed, caplog):
    _warn_of_shared_store({"TORCHELASTIC_MAX_RESTARTS": "2", "RANK": "0"} | changed)
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text) == (not changed)


def shared_classifier(ranks: Ranks, folder: str) -> torch.Tensor:
    """A hash of each rank's classifier, and the number of ranks that trained one; every rank has its own cache."""
    os.environ["STABLEFIELD_CACHE"] = f"{folder}/{ranks.rank}"
    (space,) = open_features("classifier", Reference("images", images(60)), None, ranks)
    own = int(space.identity.rpartition(":")[2][:12], 16)
    assert space(images(4).take(torch.arange(4))).shape == (4, 64)
    ranks.barrier()
    trained = len(list(Path(folder).rglob("*.safetensors")))
    return torch.cat([ranks.all_gather_int(own), ranks.all_gather_int(trained)])


def test_ranks_with_caches_of_their_own_share_the_classifier_of_the_main_rank(tmp_path):
    first, second, *trained = on_ranks(2, tmp_path, shared_classifier, folder=str(tmp_path / "caches")).tolist()
    assert first == second
    assert trained == [1, 1]
