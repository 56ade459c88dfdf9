"""A denoiser under the labels of another list of classes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffguard.errors import SettingError
from diffguard.models.denoisers.base import DenoiserWrapper, HasLayout, Savable

LABELS_FILE = "labels.json"


class RelabeledDenoiser(DenoiserWrapper):
    """A denoiser under other labels: label i stands for its ``labels[i]``.

    Args:
        labels: the denoiser's label of each new one.
    """

    def __init__(self, denoiser: Any, labels: Sequence[int]) -> None:
        super().__init__(denoiser)
        self._labels = list(labels)
        self.num_labels = len(labels)
        self.null_label: int | None = self.num_labels

    def to(self, device: torch.device | str) -> "RelabeledDenoiser":
        """Move it; returns self."""
        self._denoiser.to(device)
        return self

    def lay_out(self, memory_format: torch.memory_format) -> "RelabeledDenoiser":
        """Lay its weights out in memory where it offers that; returns self."""
        if isinstance(self._denoiser, HasLayout):
            self._denoiser.lay_out(memory_format)
        return self

    def compile(self, *, fixed: bool = False) -> "RelabeledDenoiser":
        """See `DiffusersDenoiser.compile`; returns self."""
        self._denoiser.compile(fixed=fixed)
        return self

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        labels = torch.tensor([*self._labels, self._denoiser.null_label], device=label.device)
        predicted: Tensor = self._denoiser.eps(x, timestep, labels[label])
        return predicted

    def save(self, folder: Path) -> None:
        if not isinstance(self._denoiser, Savable):
            raise SettingError(f"denoiser: {type(self._denoiser).__name__} has no method save(folder)")
        self._denoiser.save(folder)
        (folder / LABELS_FILE).write_text(json.dumps(self._labels) + "\n", encoding="utf-8")
