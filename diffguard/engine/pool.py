"""Latents at work, by index and counted references."""

from collections.abc import Sequence

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

    def put(self, values: Tensor) -> list[int]:
        """Keep values [B, ...]; each is held once."""
        return self.put_all([values])[0]

    def put_all(self, batches: Sequence[Tensor]) -> list[list[int]]:
        """Keep several batches; if memory ends, none of them."""
        count = sum(map(len, batches))
        if len(self._free) < count:
            self._grow(batches[0], count)
        return [self._keep(values) for values in batches]

    def get(self, indices: Sequence[int]) -> Tensor:
        """Their values, [B, ...]."""
        return self._rows.index_select(0, torch.tensor(indices, dtype=torch.long, device=self._rows.device))

    def hold(self, index: int) -> int:
        """Hold a row once more; returns its index."""
        self._references[index] += 1
        return index

    def release(self, index: int | None) -> None:
        """Let go of a row once; None: of none."""
        if index is not None:
            self._references[index] -= 1
            if not self._references[index]:
                self._free.append(index)

    def _keep(self, values: Tensor) -> list[int]:
        indices = [self._free.pop() for _ in range(len(values))]
        for index in indices:
            self._references[index] = 1
        self._rows.index_copy_(0, torch.tensor(indices, dtype=torch.long, device=values.device), values)
        return indices

    def _grow(self, like: Tensor, needed: int) -> None:
        count = len(self._references)
        more = max(needed, count, 16)
        spare = like.new_empty((more, *like.shape[1:]))
        self._rows = torch.cat([self._rows, spare]) if count else spare
        self._free += range(count + more - 1, count - 1, -1)
        self._references += [0] * more
