"""A denoiser under the labels of another list of classes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LABELS_FILE = "labels.json"


class RelabeledDenoiser:
    """A denoiser under other labels: label i stands for its ``labels[i]``.

    Args:
        labels: the denoiser's label of each new one.
    """

    def __init__(self, denoiser: Any, labels: Sequence[int]) -> None:
        self._denoiser = denoiser
        self._labels = list(labels)
        self.num_labels = len(labels)
        self.null_label: int | None = self.num_labels

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_denoiser":
            raise AttributeError(name)
        return getattr(self._denoiser, name)

    def to(self, device: torch.device | str) -> "RelabeledDenoiser":
        self._denoiser.to(device)
        return self

    def channels_last(self) -> "RelabeledDenoiser":
        if hasattr(self._denoiser, "channels_last"):
            self._denoiser.channels_last()
        return self

    def compile(self, *, fixed: bool = False) -> "RelabeledDenoiser":
        self._denoiser.compile(fixed=fixed)
        return self

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        known = torch.tensor([*self._labels, self._denoiser.null_label], device=label.device)
        predicted: Tensor = self._denoiser.eps(x, timestep, known[label])
        return predicted

    def save(self, folder: Path) -> None:
        self._denoiser.save(folder)
        (folder / LABELS_FILE).write_text(json.dumps(self._labels) + "\n", encoding="utf-8")
