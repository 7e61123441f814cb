"""Time that training waits for a checkpoint, beside `torch.save` of the same state to a file.

    python benchmarks/checkpoint.py [MEGABYTES] [ROUNDS]

861 MB by default: NCSN++ with one average and Adam. A ratio above 1 means that this package is faster. Both write to a
new file, which then replaces the one before, and what was written before is on the disk when a time begins: pages that
the system has not used for long take many times as long to fill, so both must find equally many of them.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from common import headline, peak_of

from stablefield.build import build
from stablefield.config import override, resolve
from stablefield.distributed import Ranks
from stablefield.engine.checkpoints import CheckpointManager
from stablefield.engine.state import TrainState
from stablefield.run import RunFolder


def manager_and_state(folder: Path, megabytes: int) -> tuple[CheckpointManager, TrainState]:
    """A run whose state has about this size: weights, one average and Adam's two moments."""
    width = round((megabytes * 1e6 / (4 * 4) / 16) ** 0.5)
    config = resolve(override({}, ["network.kind=mlp", "network.layers=4", f"network.width={width}"]))
    components = build(config)
    state = TrainState(components.denoiser)
    for parameter in state.denoiser.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    manager = CheckpointManager(RunFolder(folder), config, components)
    manager.restore(state, Ranks(torch.device("cpu")))
    return manager, state


def shown(times: list[float]) -> str:
    """Median, minimum and maximum of some seconds."""
    return f"{median(times):8.2f} s   ({min(times):.2f} to {max(times):.2f})"


def main(megabytes: int, rounds: int) -> None:
    """Print times, their ratio, and the memory beyond the state."""
    print(headline(__file__))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        manager, state = manager_and_state(Path(folder), megabytes)
        size = sum(tensor.nbytes for tensor in state.tensors().values()) / 1e6
        waits, whole, peers = [], [], []

        def save() -> None:
            os.sync()
            start = time.perf_counter()
            state.images += 1
            manager.save(state, background=True)
            waits.append(time.perf_counter() - start)
            manager.wait()
            whole.append(time.perf_counter() - start)

        for _ in range(rounds):
            os.sync()
            start = time.perf_counter()
            torch.save(state.tensors(), Path(folder) / "new.pt")
            peers.append(time.perf_counter() - start)
            os.replace(Path(folder) / "new.pt", Path(folder) / "peer.pt")
            save()
        print(f"state                    {size:8.0f} MB")
        print(f"torch.save               {shown(peers)}")
        print(f"training waits           {shown(waits)}   ratio {median(peers) / median(waits):.2f}")
        print(f"until it is on the disk  {shown(whole)}")
        print(f"memory beyond the state  {peak_of(save):8.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megabytes", type=int, nargs="?", default=861, help="size of the state (861)")
    parser.add_argument("rounds", type=int, nargs="?", default=9, help="rounds in which each way writes once (9)")
    options = parser.parse_args()
    main(options.megabytes, options.rounds)
