"""The version of jdelta."""

__version__ = "0.1.0"
