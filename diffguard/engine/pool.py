"""Latents at work, by index and counted references."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


class LatentPool:
    """Rows of one tensor. Indices are used again, so that memory is that of the images at work."""

    def __init__(self) -> None:
        self._rows = torch.empty(0)
        self._references: list[int] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        """How many rows are held."""
        return len(self._references) - len(self._free)

    @property
    def elements(self) -> int:
        """How many numbers a row has."""
        return self._rows[0].numel()

    def put(self, values: Tensor) -> list[int]:
        """Keep values [B, ...]; each is held once."""
        return self.put_all([values])[0]

    def put_all(self, batches: Sequence[Tensor]) -> list[list[int]]:
        """Keep several batches; if memory ends, none of them."""
        count = sum(values.shape[0] for values in batches)  # `len` of a tensor is slow
        if len(self._free) < count:
            self._grow(batches[0], count)
        return [self._keep(values) if values.shape[0] else [] for values in batches]

    def get(self, indices: Sequence[int]) -> Tensor:
        """Their values, [B, ...]."""
        return self._rows.index_select(0, int64(indices, self._rows.device))

    def get_all(self, columns: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """The values of several lists of as many indices, each [B, ...], gathered at once."""
        return self.get([index for column in columns for index in column]).chunk(len(columns))

    def hold(self, index: int) -> int:
        """Hold a row once more; returns its index."""
        self._references[index] += 1
        return index

    def release(self, index: int | None) -> None:
        """Let go of a row once; None: of none."""
        if index is not None:
            self.release_all((index,))

    def release_all(self, indices: Iterable[int]) -> None:
        """Let go of rows, of each once."""
        references = self._references
        for index in indices:
            references[index] -= 1
            if not references[index]:
                self._free.append(index)

    def _keep(self, values: Tensor) -> list[int]:
        count = values.shape[0]
        indices = self._free[-count:]
        del self._free[-count:]
        for index in indices:
            self._references[index] = 1
        self._rows.index_copy_(0, int64(indices, values.device), values)
        return indices

    def _grow(self, like: Tensor, needed: int) -> None:
        count = len(self._references)
        more = max(needed, count, 16)
        spare = like.new_empty((more, *like.shape[1:]))
        self._rows = torch.cat([self._rows, spare]) if count else spare
        self._free += range(count + more - 1, count - 1, -1)
        self._references += [0] * more


def int64(values: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Whole numbers as a tensor; by way of NumPy, which reads a list several times as fast as `torch.tensor`."""
    return torch.from_numpy(np.array(values, dtype=np.int64)).to(device)
