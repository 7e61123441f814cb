"""Cost of measuring the excess beside training, as a share of a run of ten minutes.

    python benchmarks/probing.py                           digits, with the network of the recipe
    python benchmarks/probing.py --random 50000 --set network.channels=16      random bytes of CIFAR-10's shape

Seconds are processor time on one thread, which other processes disturb less. The first measurement computes the exact
means, all others evaluate the network at the same points. A run of T seconds that sees an image in s seconds has one
measurement every `training.probe_every` images, and one at its end.
"""

import argparse
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from common import headline

from stablefield.build import build
from stablefield.config import Config, override, resolve
from stablefield.distributed import Ranks
from stablefield.engine.probing import RunProbes
from stablefield.engine.session import initial_state, training_steps
from stablefield.recipes import read_recipe

RUN_SECONDS = 600


def configuration(settings: list[str], random: int, folder: Path) -> Config:
    """The configuration: the recipe for digits, or the defaults with random images."""
    if not random:
        return resolve(override(read_recipe("digits"), settings))
    data = np.random.default_rng(0).integers(0, 256, (random, 3, 32, 32), dtype=np.uint8)
    np.savez(folder / "images.npz", data=data)
    of_data = ["data.kind=arrays", f"data.path={folder / 'images.npz'}", f"data.holdout={random // 10}"]
    return resolve(override({}, [*of_data, *settings]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N random images instead of the digits")
    parser.add_argument("--steps", type=int, default=20, help="training steps to time, after as many others")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(headline(__file__))
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(options.set, options.random, Path(folder))
        parts = build(config)
        state = initial_state(config, parts)
        steps = training_steps(config, parts, state, images=2**62)
        list(islice(steps, options.steps))
        start = time.process_time()
        list(islice(steps, options.steps))
        per_image = (time.process_time() - start) / (options.steps * parts.batches.size)
        probes, seconds = RunProbes(config, parts, Ranks(torch.device("cpu"))), []
        for _ in range(3):
            start = time.process_time()
            probes(state)
            seconds.append(time.process_time() - start)
    first, again = seconds[0], min(seconds[1:])
    images = RUN_SECONDS / per_image
    every = config.training.probe_every
    count = images // every + (images >= every and images % every > 0)
    cost = (first + again * (count - 1)) if count else 0.0
    print(f"training {1e3 * per_image:.3g} s per 1,000 images; a measurement {again:.3g} s, the first {first:.3g} s")
    print(
        f"a run of {RUN_SECONDS} s sees {images:,.0f} images, and measures {count:.0f} times (every {every:,} images "
        f"and at its end): {cost:.3g} s, {cost / RUN_SECONDS:.2%}"
    )


if __name__ == "__main__":
    main()
