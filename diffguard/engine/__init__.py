"""The scoring engine: many images at once, each at a place of its own, and network calls that are full."""

from diffguard.engine.batch import Scored, score_batch
from diffguard.engine.cost import network_evaluations
from diffguard.engine.engine import Engine, Found, Recipe, Request, Sample, Stats, check_request, pick_slots

__all__ = [
    "Engine",
    "Found",
    "Recipe",
    "Request",
    "Sample",
    "Scored",
    "Stats",
    "check_request",
    "network_evaluations",
    "pick_slots",
    "score_batch",
]
