"""Data sets as arrays, and the transforms between pixels and the space that networks see."""

from condense.data.datasets import Arrays, Known, Source, fingerprint, load, names, to_float
from condense.data.images import Images
from condense.data.transform import SPECS, Transform, channel_statistics, fit

__all__ = [
    "SPECS",
    "Arrays",
    "Images",
    "Known",
    "Source",
    "Transform",
    "channel_statistics",
    "fingerprint",
    "fit",
    "load",
    "names",
    "to_float",
]
