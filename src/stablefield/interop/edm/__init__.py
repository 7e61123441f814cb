"""Safe reader of the checkpoints that EDM and STF publish.

EDM's files carry, with every network, the source code of its class, which the original loader executes. Here
`stablefield.data.pickles` reads them as plain data: no source code is read, and whatever is not listed (an instruction,
a name, a class or a storage type) is refused with its name. Only data that are needed are copied, in total at most as
many bytes as the file has.

    allowlist.py   every name that may occur, and the data that stands for it
    checkpoint.py  the three file formats; weights, constructor arguments and optimiser state
"""

from stablefield.interop.edm.allowlist import LAYERS, LOSSES, NETWORKS, PRECONDITIONERS
from stablefield.interop.edm.checkpoint import EDMCheckpoint, read

__all__ = ["LAYERS", "LOSSES", "NETWORKS", "PRECONDITIONERS", "EDMCheckpoint", "read"]
