"""Where the README and the card of every exported trunk import `load_trunk` from."""

from pipeline.trunks.files import load_trunk

__all__ = ["load_trunk"]
