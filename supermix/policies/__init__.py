"""Augmentation policies and how they are searched for (chapters 3 and 47)."""

from supermix import lazy

__getattr__, __dir__ = lazy(__name__, {
    "Policy": "policies", "Augmented": "policies", "autoaugment": "policies", "randaugment": "policies",
    "trivialaugment": "policies", "load_policy": "policies", "save_policy": "policies"})
