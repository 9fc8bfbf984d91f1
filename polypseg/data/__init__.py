"""Polyp images on disk and in memory: folders, splits, audit, data set, synthetic images."""

from polypseg.data.audit import audit_pairs
from polypseg.data.classes import CLASS_COLOURS, CLASS_NAMES
from polypseg.data.dataset import PolypDataset, batches
from polypseg.data.faults import DataError, Fault
from polypseg.data.folders import Pair, find_pairs, list_images, scan_pairs
from polypseg.data.reading import read_image, read_mask, read_pair
from polypseg.data.splits import (
    Split,
    published_split,
    random_split,
    split_for,
    test_folders,
    training_folder,
)
from polypseg.data.synthetic import make_synthetic
from polypseg.data.tensors import normalize, resize_image, resize_mask, to_tensor
from polypseg.data.whole import audit_folder

__all__ = [
    "CLASS_COLOURS",
    "CLASS_NAMES",
    "DataError",
    "Fault",
    "Pair",
    "PolypDataset",
    "Split",
    "audit_folder",
    "audit_pairs",
    "batches",
    "find_pairs",
    "list_images",
    "make_synthetic",
    "normalize",
    "published_split",
    "random_split",
    "read_image",
    "read_mask",
    "read_pair",
    "resize_image",
    "resize_mask",
    "scan_pairs",
    "split_for",
    "test_folders",
    "to_tensor",
    "training_folder",
]
