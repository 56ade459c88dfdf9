"""Training of classifiers and denoisers on your own classes."""

from diffguard.training.classifier import train_classifier, untrained_classifier
from diffguard.training.denoiser import Preview, Term, train_denoiser, untrained_denoiser
from diffguard.training.loop import Progress, TrainingStep

__all__ = [
    "Preview",
    "Progress",
    "Term",
    "TrainingStep",
    "train_classifier",
    "train_denoiser",
    "untrained_classifier",
    "untrained_denoiser",
]
