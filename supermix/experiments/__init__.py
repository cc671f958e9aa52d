"""What measures and is no library: races, studies and the paper's runs (chapters 23, 46 to 62)."""

from supermix import lazy

__getattr__, __dir__ = lazy(__name__, {})
