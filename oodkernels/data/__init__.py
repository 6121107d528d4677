"""Samples and their files, images, and the outputs of a model over them."""

from oodkernels.data.arrays import ROLES, Array, FileError
from oodkernels.data.extract import (
    EXTRACT_FORMATS,
    ExtractionPlan,
    extract_images,
    is_extracted,
)
from oodkernels.data.formats import FORMATS, FileFormat
from oodkernels.data.images import (
    ImageFiles,
    OnRGB,
    Preprocess,
    Shards,
    ToTensor,
    augmented,
    open_images,
)
from oodkernels.data.models import load_model, model_classes, read_class_names
from oodkernels.data.samples import (
    Samples,
    match_classes,
    open_arrays,
    open_samples,
    save_arrays,
)
from oodkernels.data.synthetic import HierarchicalFeatures, SyntheticBatch

__all__ = [
    "EXTRACT_FORMATS",
    "FORMATS",
    "ROLES",
    "Array",
    "ExtractionPlan",
    "FileError",
    "FileFormat",
    "HierarchicalFeatures",
    "ImageFiles",
    "OnRGB",
    "Preprocess",
    "Samples",
    "Shards",
    "SyntheticBatch",
    "ToTensor",
    "augmented",
    "extract_images",
    "is_extracted",
    "load_model",
    "match_classes",
    "model_classes",
    "open_arrays",
    "open_images",
    "open_samples",
    "read_class_names",
    "save_arrays",
]
