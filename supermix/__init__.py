"""SuperMix: images mixed under the supervision of a teacher, and students that learn from them."""

__version__ = "0.1.0"

from importlib import import_module
from importlib.util import find_spec
from sys import modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names below, for editors and type checkers
    from supermix.data import load_data, load_folder
    from supermix.distillation.distill import distill, make_mixes
    from supermix.mixing.solver import SuperMix
    from supermix.mixing.store import MixedDataset
    from supermix.training.loop import accuracy
    from supermix.zoo import create, load, predict, pretrained, save


def lazy(package, names):
    """The `__getattr__` and `__dir__` of a package (PEP 562): `names` gives the module in which each name is defined. A
    module is imported at the first use of one of its names, so that slow imports happen only if they are needed."""

    def get(name):
        if name in names:
            value = getattr(import_module(f"{package}.{names[name]}"), name)
        elif not name.startswith("_") and find_spec(f"{package}.{name}"):
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(modules[package]), *names})


MODULES = {
    "load_data": "data",
    "load_folder": "data",
    "create": "zoo",
    "pretrained": "zoo",
    "SuperMix": "mixing.solver",
    "make_mixes": "distillation.distill",
    "MixedDataset": "mixing.store",
    "distill": "distillation.distill",
    "accuracy": "training.loop",
    "save": "zoo",
    "load": "zoo",
    "predict": "zoo",
}

__all__ = list(MODULES)
__getattr__, __dir__ = lazy(__name__, MODULES)
