"""A run on disk: the files of its folder, the denoiser in its checkpoints, and its export.

runs/digits/config.toml               the resolved configuration
            checkpoint.safetensors    the newest checkpoint: weights, their averages, state of the optimiser
            checkpoints/              the checkpoints before it, up to `training.keep_checkpoints` with the newest
            best.safetensors          the checkpoint with the lowest loss on held-out data, if there are any
            metrics.jsonl             the metrics, one JSON object per line
            scores.jsonl              the scores of `stablefield evaluate`, one JSON object per table
            loss.png                  the loss, its floor and the excess over it
            tensorboard/, sheets/     the same metrics as events; sheets of samples during training

An export is a folder of three files, which `load` reads as it reads a run (see `run.export`).
"""

from stablefield.run.export import export_run
from stablefield.run.folder import RunFolder, checkpoint_of, run_folder
from stablefield.run.trained import TrainedRun, describe, load, open_run, training_data

__all__ = [
    "RunFolder",
    "TrainedRun",
    "checkpoint_of",
    "describe",
    "export_run",
    "load",
    "open_run",
    "run_folder",
    "training_data",
]
