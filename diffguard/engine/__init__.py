"""The scoring engine: many images at once, each at a noise level of its own, and network calls that are full."""

from diffguard.engine.batch import Scored, score_batch
from diffguard.engine.cost import network_evaluations
from diffguard.engine.engine import Engine
from diffguard.engine.processes import EngineProcesses, core_count, engine_for, open_processes, start_ahead
from diffguard.engine.tuning import Tuning, pick_threads, tune
from diffguard.engine.types import Request, Sample, ScoreResult, Stats, check_request

__all__ = [
    "Engine",
    "EngineProcesses",
    "Request",
    "Sample",
    "ScoreResult",
    "Scored",
    "Stats",
    "Tuning",
    "check_request",
    "core_count",
    "engine_for",
    "network_evaluations",
    "open_processes",
    "pick_threads",
    "score_batch",
    "start_ahead",
    "tune",
]
