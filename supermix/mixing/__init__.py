"""Mixing images: masks, the search that a teacher supervises, and stores of what it found (chapters 29 to 39)."""

from supermix import lazy

__getattr__, __dir__ = lazy(__name__, {
    "SuperMix": "solver", "Mixed": "solver", "MixUp": "mixers", "CutMix": "mixers", "CutMixInside": "mixers",
    "Mixer": "mixers", "PuzzleMix": "puzzlemix", "Engine": "engine", "MixedDataset": "store", "Store": "store",
    "export_images": "store", "mix": "masks", "masks_from_theta": "masks", "show_mixes": "masks"})
