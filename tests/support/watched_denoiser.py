"""A denoiser that is watched at work, on a device as small as a test wants it."""

import torch


class Watched:
    """A denoiser that notes what its network is asked, of which memory holds at most so many images."""

    def __init__(self, denoiser, most=10**9):
        self._denoiser, self.most, self.asked, self.batches = denoiser, most, [], []

    def __getattr__(self, name):
        return getattr(self._denoiser, name)

    def eps(self, x, timestep, label):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("more than this device holds")
        self.batches.append(len(x))
        for each, t, y in zip(x, timestep.tolist(), label.tolist(), strict=True):
            self.asked.append((each.numpy().tobytes(), t, y))
        return self._denoiser.eps(x, timestep, label)
