"""Data sets: reading, storing and exporting them, augmentation, and the order in which a run sees its data."""

from stablefield.data.arrays import Arrays
from stablefield.data.augmentation import (
    Augmentation,
    AugmentedBatches,
    EDMAugmentation,
    LabelDropout,
    Mirror,
    NoAugmentation,
)
from stablefield.data.batches import Batch, BatchSource, ShuffledBatches
from stablefield.data.cifar import CIFAR
from stablefield.data.contents import (
    Contents,
    DataSummary,
    Progress,
    StageProgress,
    content_hash,
    range_question,
    silent,
    silent_stage,
)
from stablefield.data.conversion import Converted, Inspection, convert, inspect, write_npz, write_zip
from stablefield.data.dataset import DatasetSource
from stablefield.data.guess import data_section, guess_kind
from stablefield.data.hub import HuggingFace
from stablefield.data.idx import IDX
from stablefield.data.images import CelebA, Images, ImageSource
from stablefield.data.notices import say
from stablefield.data.sources import Digits, Source, UnknownData, split
from stablefield.data.store import Store, write_store
from stablefield.files import printable

__all__ = [
    "CIFAR",
    "IDX",
    "Arrays",
    "Augmentation",
    "AugmentedBatches",
    "Batch",
    "BatchSource",
    "CelebA",
    "Contents",
    "Converted",
    "DataSummary",
    "DatasetSource",
    "Digits",
    "EDMAugmentation",
    "HuggingFace",
    "ImageSource",
    "Images",
    "Inspection",
    "LabelDropout",
    "Mirror",
    "NoAugmentation",
    "Progress",
    "ShuffledBatches",
    "Source",
    "StageProgress",
    "Store",
    "UnknownData",
    "content_hash",
    "convert",
    "data_section",
    "guess_kind",
    "inspect",
    "printable",
    "range_question",
    "say",
    "silent",
    "silent_stage",
    "split",
    "write_npz",
    "write_store",
    "write_zip",
]
