"""Where the README and the cards of exported trunks and classifiers import from."""

from pipeline.trunks.classifier import load_classifier
from pipeline.trunks.files import load_trunk

__all__ = ["load_classifier", "load_trunk"]
