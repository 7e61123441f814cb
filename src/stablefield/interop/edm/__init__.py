"""Reads the checkpoints that EDM and STF publish, without unpickling them.

A pickle is a program for a small stack machine, and some of its instructions call whatever function the
file names. EDM's files lean on that: beside every network they carry the source code of its class, which the
original loader executes. Whoever can write such a file can run anything on the machine that loads it.

So nothing is unpickled here. The standard library describes the instructions, and a machine *without a call*
follows them: a name becomes a record of that name, provided that it stands in a table; "calling" it looks it
up in the table and yields plain data,

    bytes -> instructions -> dict, list, tuple, str, int, float | Object | TensorView

and whatever is not listed, be it an instruction, a name, a class or a storage type, is refused by name.
Nothing is imported, no source code is looked at, and no object of the file ever has a method. Two more rules
keep a small file small: the work is linear in its length, and nothing is copied before it is known to be
wanted, at which point the copies together may not outweigh the file.

    names.py       the table: every name that may occur, and the data that it stands for
    machine.py     the machine: every instruction that may occur
    forms.py       a plain pickle, torch's zip of a pickle and its storages, torch's older chain of pickles
    checkpoint.py  from the data to weights, constructor arguments and optimiser state
"""

from stablefield.interop.edm.checkpoint import EDMCheckpoint, read
from stablefield.interop.edm.names import LAYERS, LOSSES, NETWORKS, PRECONDITIONERS, RefusedCheckpoint

__all__ = ["LAYERS", "LOSSES", "NETWORKS", "PRECONDITIONERS", "EDMCheckpoint", "RefusedCheckpoint", "read"]
