"""The version of the package, which checkpoints, cards and reports record."""

__version__ = "0.1.0"
