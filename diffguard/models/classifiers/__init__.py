"""Classifiers under protection: small ones that the library trains, and wrappers for any other network."""

from diffguard.models.classifiers.base import Classifier, predict_logits
from diffguard.models.classifiers.files import load_classifier, save_classifier
from diffguard.models.classifiers.small import (
    ConvClassifier,
    ResidualClassifier,
    TransformerClassifier,
    WhitenedClassifier,
)
from diffguard.models.classifiers.wrapped import NetworkClassifier

__all__ = [
    "Classifier",
    "ConvClassifier",
    "NetworkClassifier",
    "ResidualClassifier",
    "TransformerClassifier",
    "WhitenedClassifier",
    "load_classifier",
    "predict_logits",
    "save_classifier",
]
