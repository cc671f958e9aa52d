"""Training a network: checkpoints, logs and the loop (chapters 20 to 22)."""

from supermix import lazy

__getattr__, __dir__ = lazy(__name__, {
    "train": "loop", "Objective": "loop", "Batch": "loop", "accuracy": "loop", "join": "loop", "History": "loop",
    "save_checkpoint": "checkpoints", "load_checkpoint": "checkpoints", "read_log": "logs"})
