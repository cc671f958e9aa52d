"""SuperMix: mixed images that a teacher asks for, and students that learn from them."""

__version__ = "0.1.0"

from supermix.data import load_data, load_folder
from supermix.distillation import distill, make_mixes
from supermix.mixing import SuperMix
from supermix.store import MixedDataset
from supermix.training import accuracy
from supermix.zoo import create, load, predict, pretrained, save

__all__ = ["load_data", "load_folder", "create", "pretrained", "SuperMix", "make_mixes", "MixedDataset", "distill", "accuracy", "save", "load", "predict"]
