"""Safe reader of the checkpoints that EDM and STF publish, which never unpickles them.

A pickle is a program for a small stack machine, and some of its instructions call any function that the file names.
EDM's files rely on that: with every network they carry the source code of its class, which the original loader
executes. Whoever can write such a file can run anything on the machine that loads it.

Here nothing is unpickled. The standard library describes the instructions, and an interpreter *without a call
instruction* follows them: a name becomes a record of that name, if it is on an allow-list; "calling" it looks it up in
the list and yields plain data,

    bytes -> instructions -> dict, list, tuple, str, int, float | Object | TensorView

and whatever is not listed (an instruction, a name, a class or a storage type) is refused with its name. Nothing is
imported, no source code is read, and no object of the file ever has a method. Two more rules bound time and memory: the
work is linear in the length of the file, and only data that are needed are copied, in total at most as many bytes as
the file has.

    allowlist.py   every name that may occur, and the data that stands for it
    unpickler.py   interpreter of every instruction that may occur
    containers.py  a plain pickle, torch's ZIP file of a pickle and its storages, torch's legacy sequence of pickles
    checkpoint.py  from the data to weights, constructor arguments and optimiser state
"""

from stablefield.interop.edm.allowlist import LAYERS, LOSSES, NETWORKS, PRECONDITIONERS, EDMCheckpointError
from stablefield.interop.edm.checkpoint import EDMCheckpoint, read

__all__ = ["LAYERS", "LOSSES", "NETWORKS", "PRECONDITIONERS", "EDMCheckpoint", "EDMCheckpointError", "read"]
