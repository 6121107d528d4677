"""Samples and their files, images, and the outputs of a model over them."""

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
from oodkernels.data.samples import (
    FORMATS,
    ROLES,
    Array,
    Samples,
    open_arrays,
    open_samples,
    save_arrays,
)
from oodkernels.data.synthetic import HierarchicalFeatures, SyntheticBatch

__all__ = [
    "FORMATS",
    "ROLES",
    "Array",
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
    "open_arrays",
    "open_images",
    "open_samples",
    "save_arrays",
]
