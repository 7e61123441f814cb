"""The result of an evaluation: tables of scores, each with everything that its scores depend on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from stablefield import __version__
from stablefield.evaluate.estimate import Estimate
from stablefield.evaluate.frechet import Statistics
from stablefield.files import append


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores in one feature space, or those of memorisation, with everything that they depend on.

    Attributes:
        scores: the scores by name; empty without a reference.
        samples: where the samples come from, their number and seeds.
        reference: name, number of data points and hash of the reference.
        features: name, identity and dimension of the features.
        notes: sentences on what limits the scores.
        statistics: mean and covariance of the features of all samples; None for memorisation.
        pairs: the samples most like copies, each followed by its nearest training image, (2n, C, H, W); None for other
            scores, and for data that are not images.
    """

    scores: Mapping[str, Estimate]
    samples: Mapping[str, Any]
    reference: Mapping[str, Any]
    features: Mapping[str, Any]
    notes: Sequence[str] = ()
    statistics: Statistics | None = None
    pairs: Float[Tensor, "n C H W"] | None = None

    def record(self) -> dict[str, Any]:
        """The table as it is written to files, with the date and the version of this package."""
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "stablefield": __version__,
            "samples": dict(self.samples),
            "reference": dict(self.reference),
            "features": dict(self.features),
            "scores": {name: estimate.as_dict() for name, estimate in self.scores.items()},
            "notes": list(self.notes),
        }

    def append_to(self, path: Path) -> None:
        """Append the table to a file, as one line of JSON.

        Args:
            path: the file.

        Raises:
            OSError: the file cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, json.dumps(self.record()) + "\n")


@dataclass(frozen=True, eq=False)
class Scores:
    """The result of an evaluation.

    Attributes:
        tables: one table for each feature space, and one for memorisation.
    """

    tables: Sequence[ScoreTable]

    def __getitem__(self, name: str) -> Estimate:
        """A score, from the first table that has it.

        Args:
            name: name of the score, such as "frechet" or "fid".

        Raises:
            KeyError: there is no such score.
        """
        for table in self.tables:
            if name in table.scores:
                return table.scores[name]
        known = [score for table in self.tables for score in table.scores]
        raise KeyError(f"there is no score {name!r}; there are {', '.join(known)}")

    def means(self) -> dict[str, float]:
        """Mean of every score by name, each from the first table that has it."""
        return {name: estimate.mean for table in reversed(self.tables) for name, estimate in table.scores.items()}
