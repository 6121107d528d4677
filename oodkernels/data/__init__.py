"""Samples and their files, images, and the outputs of a model over them."""

from oodkernels.data.arrays import ROLES, Array, FileError
from oodkernels.data.extract import (
    ImageFiles,
    Plan,
    RandomCrop,
    Shards,
    ToTensor,
    augmented,
    extract_images,
    is_extracted,
    load_model,
    open_images,
)
from oodkernels.data.formats import FORMATS, FileFormat
from oodkernels.data.samples import (
    Samples,
    match_classes,
    open_arrays,
    open_samples,
    save_arrays,
)
from oodkernels.data.synthetic import HierarchicalFeatures, SyntheticBatch

__all__ = [
    "FORMATS",
    "ROLES",
    "Array",
    "FileError",
    "FileFormat",
    "HierarchicalFeatures",
    "ImageFiles",
    "Plan",
    "RandomCrop",
    "Samples",
    "Shards",
    "SyntheticBatch",
    "ToTensor",
    "augmented",
    "extract_images",
    "is_extracted",
    "load_model",
    "match_classes",
    "open_arrays",
    "open_images",
    "open_samples",
    "save_arrays",
]
