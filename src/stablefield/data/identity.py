"""The identity of the data of a run: a hash that is compared wherever the data are loaded again.

HASH                    all data, `content_hash`
HASH of N, all HASH     for large data: first an evenly spaced part of the N data points, which is compared at once,
and then all data, which a run in training hashes in the background
"""

import threading

import torch

from stablefield.data.contents import content_hash
from stablefield.kinds import ConfigError
from stablefield.pool import Pool

_LARGE = 2**28  # bytes of data beyond which a part is hashed first
_ALL = ", all "
_WAY_OUT = "put the run's data back, or start a new run with --init-from RUN"


def fingerprint(pool: Pool, *, whole: bool = True) -> str:
    """Hash that identifies the data of a run.

    Args:
        pool: all data of the source.
        whole: False to hash only a part of large data.
    """
    stride = -(-len(pool) * pool.data[0].nbytes // _LARGE)
    if stride <= 1:
        return content_hash(pool)
    part = content_hash(pool.subset(torch.arange(0, len(pool), stride)))
    return f"{part} of {len(pool)}{_ALL + content_hash(pool) if whole else ''}"


def is_same(found: str, known: str) -> bool:
    """True if two fingerprints can be of the same data; where one lacks the hash of all data, their parts decide.

    Args:
        found: a fingerprint.
        known: another one.
    """
    (part, _, whole), (known_part, _, known_whole) = found.partition(_ALL), known.partition(_ALL)
    return part == known_part and (not whole or not known_whole or whole == known_whole)


def refuse_other_data(data: Pool, found: str, known: str, way_out: str) -> None:
    """Refuse data that are not those a run was trained on.

    Args:
        data: the data that were loaded.
        found: their fingerprint.
        known: the fingerprint in the run; "" if it has none.
        way_out: what the user can do, the end of the message.

    Raises:
        ConfigError: the data differ, or the run has no fingerprint.
    """
    if not known:
        raise ConfigError(f"the checkpoint does not record which data the run was trained on; {way_out}")
    if not is_same(found, known):
        raise ConfigError(
            f"these are not the data that the run was trained on: {data!r} has the hash {_shorten(found)}, and the "
            f"run's data {_shorten(known)}; {way_out}"
        )


def _shorten(found: str) -> str:
    """The first digits of a fingerprint."""
    part, _, whole = found.partition(_ALL)
    digest, of, count = part.partition(" of ")
    return f"{digest[:16]}{of}{count}{_ALL + whole[:16] if whole else ''}"


class DataIdentity:
    """Fingerprint of the data of a run in training, which a thread completes for large data.

    Attributes:
        pool: all data of the run.
        found: fingerprint of the data, as far as it is computed.
        known: fingerprint in the checkpoint that the run resumes from; "" for a new run.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool, self.found, self.known = pool, fingerprint(pool, whole=False), ""
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._complete, name="data hash", daemon=True)
        if " of " in self.found:
            self._thread.start()

    def _complete(self) -> None:
        try:
            self.found += _ALL + content_hash(self.pool)
        except Exception as error:  # it is raised again by `checked`
            self._failure = error

    def compare(self, known: str) -> None:
        """Compare what is computed with the fingerprint in a checkpoint; `checked` compares the rest.

        Args:
            known: the fingerprint in the checkpoint.

        Raises:
            ConfigError: the data differ.
        """
        refuse_other_data(self.pool, self.found, known, _WAY_OUT)
        self.known = known

    def checked(self, *, wait: bool) -> str:
        """The fingerprint to write into a checkpoint.

        Args:
            wait: True to wait until all data are hashed; else the fingerprint of the run may be returned unchecked.

        Raises:
            ConfigError: the data are not those of the run.
        """
        if wait and self._thread.ident is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure
        found = self.found
        if self.known:
            refuse_other_data(self.pool, found, self.known, _WAY_OUT)
        return found if _ALL in found else self.known or found
