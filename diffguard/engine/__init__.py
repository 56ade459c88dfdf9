"""The scoring engine: many images at once, each at a noise level of its own, and network calls that are full."""

from diffguard.engine.batch import Scored, score_batch
from diffguard.engine.cost import network_evaluations
from diffguard.engine.engine import Engine
from diffguard.engine.slots import pick_slots
from diffguard.engine.types import Request, Sample, ScoreResult, Stats, check_request

__all__ = [
    "Engine",
    "Request",
    "Sample",
    "ScoreResult",
    "Scored",
    "Stats",
    "check_request",
    "network_evaluations",
    "pick_slots",
    "score_batch",
]
