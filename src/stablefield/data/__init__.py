"""Where data come from, and in which order they are seen."""

from stablefield.data.augment import Augmentation, Augmented, EDMAugmentation, LabelDropout, Mirror, Plain
from stablefield.data.batches import Batch, Batches, Shuffled
from stablefield.data.cifar import CIFAR
from stablefield.data.contents import Contents, Progress, content_hash, silent
from stablefield.data.distances import NeighbourDistances
from stablefield.data.forms import write_npz, write_zip
from stablefield.data.guess import guess_kind
from stablefield.data.hub import HuggingFace
from stablefield.data.idx import IDX
from stablefield.data.images import CelebA, Images, Pictures
from stablefield.data.rolling import Rolling
from stablefield.data.search import FoundNeighbours
from stablefield.data.sources import Arrays, Digits, Source, Unnamed, split
from stablefield.data.store import Store, write
from stablefield.data.summary import Summary

__all__ = [
    "CIFAR",
    "IDX",
    "Arrays",
    "Augmentation",
    "Augmented",
    "Batch",
    "Batches",
    "CelebA",
    "Contents",
    "Digits",
    "EDMAugmentation",
    "FoundNeighbours",
    "HuggingFace",
    "Images",
    "LabelDropout",
    "Mirror",
    "NeighbourDistances",
    "Pictures",
    "Plain",
    "Progress",
    "Rolling",
    "Shuffled",
    "Source",
    "Store",
    "Summary",
    "Unnamed",
    "content_hash",
    "guess_kind",
    "silent",
    "split",
    "write",
    "write_npz",
    "write_zip",
]
