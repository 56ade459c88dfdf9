"""Learning-rate schedules, as factors of the highest rate."""

import math


def one_cycle(done: float, warmup: float) -> float:
    """One-cycle: a cosine rise from 1/25 to 1, then a cosine decay to 0 (arXiv 1708.07120); in [0, 1].

    Args:
        done: fraction of the training that is done, in [0, 1].
        warmup: fraction in which the rate rises, in [0, 1].

    Example:
        >>> [round(one_cycle(done, 0.5), 2) for done in (0.0, 0.5, 0.75, 1.0)]
        [0.04, 1.0, 0.5, 0.0]
    """
    if done < warmup:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * done / warmup)) / 2
    return (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2


def warmup_stable_decay(step: int, warmup_steps: int, decayed: float) -> float:
    """Warmup-stable-decay: a linear rise, a constant rate, and a 1 − √x decay (arXiv 2405.18392); in [0, 1].

    Only the decay depends on the length of the training, so that it can be extended.

    Args:
        step: number of steps done.
        warmup_steps: number of steps in which the rate rises.
        decayed: fraction x of the decay that is done; 0 before it.

    Example:
        >>> [warmup_stable_decay(step, 100, 0) for step in (0, 49, 100, 9000)]
        [0.01, 0.5, 1.0, 1.0]
        >>> [warmup_stable_decay(9000, 100, decayed) for decayed in (0.25, 1)]
        [0.5, 0.0]
    """
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return rise * (1 - math.sqrt(min(1.0, decayed)))
