"""SuperMix: mixed images that a teacher asks for, and students that learn from them."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

from supermix.data import load_data, load_folder
from supermix.mixing import SuperMix
from supermix.store import MixedDataset
from supermix.training import accuracy
from supermix.zoo import create, load, predict, pretrained, save

if TYPE_CHECKING: from supermix.distillation import distill, make_mixes

__all__ = ["load_data", "load_folder", "create", "pretrained", "SuperMix", "make_mixes", "MixedDataset", "distill", "accuracy", "save", "load", "predict"]


def __getattr__(name):  # these two come with supermix.generate, which Python must not have imported before `python -m supermix.generate`
    if name not in ("distill", "make_mixes"): raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from supermix import distillation
    return getattr(distillation, name)
