"""Change a checkpoint at random and open it as every command does; `test_checkpoint.py` runs this in its own process.

    python checkpoint_fuzz.py SEED ROUNDS FOLDER CHECKPOINT

The checksum is made to match, as an attacker can do. Prints how many were opened and how many refused. Fails on an
error that the command line does not print in one line, after ten seconds on one file, or beyond 1 GB of memory.
"""

import copy
import json
import random
import resource
import signal
import sys
from pathlib import Path

import torch

from stablefield.build import build_sampler
from stablefield.checkpoint import FORMAT, checksum, read, write_tensors
from stablefield.config import resolve
from stablefield.engine.checkpoints import latest_config
from stablefield.engine.state import TrainState
from stablefield.run import RunFolder, open_run

DEEP = 50_000
VALUES = [
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        -1,
        -1e18,
        0,
        1e-320,
        0.5,
        2,
        1e12,
        2**31,
        10**18,
        10**400,
        True,
        None,
    ),
    *("", "x", "\x1b[2J", "<script>alert(1)</script>", "a\nb", "os:system", "\ud800", "vp", "edm", "9" * 5000),
    *([], {}, [1] * 100, [[-1]], {"kind": "ve"}, [2**40, 2**40], [10**18], "deep"),
]


def places(value, path=()):
    """Paths of all values in nested dictionaries and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def changed(config, draw):
    """The configuration with another value, or another key, at a random place."""
    config = copy.deepcopy(config)
    for _ in range(draw.choice([1, 1, 1, 2])):
        *path, last = draw.choice([path for path in places(config) if path])
        target = config
        for key in path:
            target = target[key]
        if draw.random() < 0.1 and isinstance(target, dict):
            last = draw.choice(["\x1b[2J", "<script>", "", "kind", "x" * 1000])
        target[last] = copy.deepcopy(draw.choice(VALUES))
        if draw.random() < 0.05 and isinstance(target, dict):
            del target[last]
    return config


def text_of(config, draw):
    """The configuration as JSON, sometimes not of a dictionary, nested deeply, or cut short."""
    text = json.dumps(config).replace('"deep"', "[" * DEEP + "]" * DEEP)
    kind = draw.random()
    if kind < 0.03:
        return draw.choice(["[]", "null", "1", '"x"', "", "{", "[" * DEEP, '{"a": 1, "a": 2}'])
    return text[: draw.randrange(len(text))] if kind < 0.05 else text


def changed_tensors(tensors, draw):
    tensors = dict(tensors)
    name = draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    match draw.randrange(5):
        case 0:
            pass
        case 1:
            tensors[name] = torch.zeros(3)
        case 2:
            tensors[draw.choice(["optimizer.99999.exp_avg", "optimizer.x", "steps.skipped", "scaler.x", ""])] = tensor
        case 3:
            tensors[name] = torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else -tensor
        case 4:
            tensors[name] = tensor.double() if tensor.is_floating_point() else tensor.float()
    return tensors


def opened(path):
    """Open a checkpoint as sampling and resuming do."""
    trained = open_run(path, device="cpu")
    config = latest_config(RunFolder(path.parent)) or trained.config
    build_sampler(config)
    state = TrainState(copy.deepcopy(trained.denoiser).requires_grad_(True), emas=config.training.emas)
    state.restore(read(path).tensors, trained.images)
    trained.config.make("data")


def outcome(path):
    signal.alarm(10)
    try:
        opened(path)
        return "opened"
    except (ValueError, OSError):
        return "refused"
    finally:
        signal.alarm(0)


def main(seed, rounds, folder, file):
    draw, counts = random.Random(int(seed)), {"opened": 0, "refused": 0}
    path, found = RunFolder(Path(folder)).checkpoint, read(Path(file))
    opened(Path(file))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2**30, used + 2**30))
    resolve({})
    for round_ in range(int(rounds)):
        tensors = changed_tensors(found.tensors, draw) if draw.random() < 0.2 else found.tensors
        config = changed(found.config, draw) if tensors is found.tensors else found.config
        images = draw.choice([str(found.images)] * 20 + ["-1", "1e3", "9" * 30, "", "nan"])
        metadata = {"format": FORMAT, "config": text_of(config, draw), "images": images}
        try:
            write_tensors(path, tensors, metadata | {"checksum": checksum(tensors, metadata)})
        except UnicodeEncodeError:
            continue
        try:
            counts[outcome(path)] += 1
        except BaseException:
            print(f"round {round_}: {metadata['config'][:2000]} {images}", file=sys.stderr)
            raise
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
