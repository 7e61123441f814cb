"""Time from the start of a process to the end of its first training step with exact targets, and its memory.

    python benchmarks/start.py [--sizes 50000 1000000]

A store of N synthetic images of 3 x 32 x 32 bytes is written to a temporary folder (3 GB for a million, removed at the
end) and mapped from there. A new process imports the package, builds a run with a small network, computes the targets
of its first 1,024 examples, and takes a step. Its memory includes the pages of the file that it has read.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import headline, memory
from training import synthetic

from stablefield.build import build
from stablefield.config import override, resolve
from stablefield.data import write_store
from stablefield.data.contents import Contents
from stablefield.engine.session import initial_state, training_steps


def images(n: int) -> Contents:
    """Synthetic images: 50,000 of them, then the same shifted sideways by one pixel, by two, and so on."""
    first = synthetic(min(n, 50_000)).data.numpy()

    def blocks() -> Iterator[np.ndarray]:
        for shift in range(-(-n // len(first))):
            for part in np.array_split(first[: n - shift * len(first)], 16):
                yield np.roll(part, shift, -1)

    return Contents(n, blocks)


def first_step(store: str, start: float) -> None:
    """Take one step, and print seconds by the clock and of the processor, and memory in MB."""
    settings = ["data.kind=store", f"data.path={store}", "target.kind=exact", "network.channels=16"]
    config = resolve(override({}, settings))
    components = build(config)
    next(training_steps(config, components, initial_state(config, components)))
    print(time.time() - start, time.process_time(), memory("VmHWM"), memory("RssFile"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[50_000, 1_000_000], help="numbers of images")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        first_step(options.child[0], float(options.child[1]))
        sys.exit()
    print(headline(__file__))
    for n in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_store(Path(folder) / "store", images(n), source="synthetic")
            command = [sys.executable, __file__, "--child", str(Path(folder) / "store"), str(time.time())]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            clock, processor, most, mapped = map(float, output.split())
            print(
                f"{n:9,} x 3,072 bytes   {clock:6.1f} s   processor {processor:6.1f} s   "
                f"memory {most:6,.0f} MB, of which {mapped:6,.0f} MB are mapped files",
                flush=True,
            )
