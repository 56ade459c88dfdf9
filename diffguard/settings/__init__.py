"""Settings as typed objects. Nothing here imports torch, so that checking a configuration is quick."""

from diffguard.settings.base import Settings, parse_settings
from diffguard.settings.detectors import COMBINATION_KINDS, Baseline, Combination, CombinationKind
from diffguard.settings.distances import DISTANCES, PATH, DistanceKind, DistanceName
from diffguard.settings.images import ImageFormat
from diffguard.settings.models import (
    ClassifierFile,
    ClassifierSpec,
    DenoiserSpec,
    LibraryClassifier,
    ObjectClassifier,
    ObjectDenoiser,
    ObjectName,
    PretrainedDenoiser,
    TrainedClassifier,
    TrainedDenoiser,
)
from diffguard.settings.training import RECIPES, Augmentation, ClassifierTraining, DenoiserTraining, Training
from diffguard.settings.variant import (
    DEFAULT_VARIANT,
    PRESETS,
    STANDARD_PATH,
    AdaptiveStop,
    AllLabels,
    ClassifierGuidance,
    Guidance,
    LabelGuidance,
    NoGuidance,
    PathGaussian,
    Variant,
)

__all__ = [
    "COMBINATION_KINDS",
    "DEFAULT_VARIANT",
    "DISTANCES",
    "PATH",
    "PRESETS",
    "RECIPES",
    "STANDARD_PATH",
    "AdaptiveStop",
    "AllLabels",
    "Augmentation",
    "Baseline",
    "ClassifierFile",
    "ClassifierGuidance",
    "ClassifierSpec",
    "ClassifierTraining",
    "Combination",
    "CombinationKind",
    "DenoiserSpec",
    "DenoiserTraining",
    "DistanceKind",
    "DistanceName",
    "Guidance",
    "ImageFormat",
    "LabelGuidance",
    "LibraryClassifier",
    "NoGuidance",
    "ObjectClassifier",
    "ObjectDenoiser",
    "ObjectName",
    "PathGaussian",
    "PretrainedDenoiser",
    "Settings",
    "TrainedClassifier",
    "TrainedDenoiser",
    "Training",
    "Variant",
    "parse_settings",
]
