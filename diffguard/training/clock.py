"""The clock of a training: by steps, or by a time budget."""

import time
from typing import Any


class Clock:
    """Measures how much of a training is done: of its steps, or of its time budget if that is used up sooner.

    Args:
        steps: total number of steps.
        minutes: time budget; None: unlimited.
        finish_minutes: end in this time instead; None: by steps and minutes.
    """

    def __init__(self, steps: int, minutes: float | None, finish_minutes: float | None = None) -> None:
        self.steps, self.minutes, self.finish_minutes, self.step = steps, minutes, finish_minutes, 0
        self.finishing_since = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds spent on the training, including earlier runs."""
        return time.monotonic() - self._started

    @property
    def done(self) -> float:
        """The fraction that is done, in [0, 1]; 1 at the end."""
        if self.finish_minutes is not None:
            return min(1.0, (self.seconds - self.finishing_since) / (60 * self.finish_minutes))
        spent = 0.0 if self.minutes is None else self.seconds / (60 * self.minutes)
        return min(1.0, max(self.step / self.steps, spent))

    def decayed(self, fraction: float) -> float:
        """Return the fraction of the learning rate's decay that is done, in [0, 1]; 0 before it starts.

        Args:
            fraction: the last part of the training, in which the rate decays; with `finish_minutes` it decays in all
                of that time.
        """
        fraction = 1.0 if self.finish_minutes is not None else fraction
        return max(0.0, (self.done - (1 - fraction)) / fraction)

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        since = None if self.finish_minutes is None else self.finishing_since
        return {"step": self.step, "seconds": self.seconds, "finishing_since": since}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the values of a checkpoint."""
        self.step, self._started = state["step"], time.monotonic() - state["seconds"]
        since = state["finishing_since"]
        self.finishing_since = state["seconds"] if since is None else since
