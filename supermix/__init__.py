"""SuperMix: mixed images that a teacher asks for, and students that learn from them."""

__version__ = "0.1.0"

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what the names below are, for editors and type checkers
    from supermix.data import load_data, load_folder
    from supermix.distillation import distill, make_mixes
    from supermix.mixing import SuperMix
    from supermix.store import MixedDataset
    from supermix.training import accuracy
    from supermix.zoo import create, load, predict, pretrained, save

MODULES = {  # where each name is defined; a module is imported when the first of its names is asked for
    "load_data": "data", "load_folder": "data", "create": "zoo", "pretrained": "zoo", "SuperMix": "mixing",
    "make_mixes": "distillation", "MixedDataset": "store", "distill": "distillation", "accuracy": "training",
    "save": "zoo", "load": "zoo", "predict": "zoo"}

__all__ = list(MODULES)


def __getattr__(name):  # Python calls this for a name that is not defined above (PEP 562)
    if name in MODULES: value = getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}"): value = import_module(f"{__name__}.{name}")
    else: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *__all__})
