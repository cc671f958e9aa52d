"""The search as a widget: a trace, its pictures and their controls (chapters 70 to 72)."""

from supermix import lazy

__getattr__, __dir__ = lazy(__name__, {
    "explore": "widget"})
