"""Students that learn from a teacher: losses and training (chapters 40 to 45)."""

from supermix import lazy

__getattr__, __dir__ = lazy(__name__, {
    "make_mixes": "distill", "Distillation": "distill", "kd_loss": "losses", "dkd_loss": "losses", "dist_loss":
    "losses", "std_loss": "losses"})
