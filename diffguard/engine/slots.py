"""How many images go into one call of the network."""

import time

import torch

from diffguard.models.denoisers.base import Denoiser


@torch.no_grad()
def pick_slots(denoiser: Denoiser, largest: int = 256, seconds: float = 2.0) -> int:
    """The batch at which the network evaluates the most images a second, by a short measurement.

    Sizes double until the rate has not grown by 3 % twice, memory ends, or the time is up; of sizes
    that are about as fast, the smallest.
    """
    channels, side, _ = denoiser.image_shape
    latents = denoiser.encode(torch.zeros(1, channels, side, side, device=denoiser.device))
    deadline = time.perf_counter() + seconds
    best_size, best_rate, not_faster, size = 1, 0.0, 0, 1
    while size <= largest and not_faster < 2 and time.perf_counter() < deadline:
        x = latents.expand(size, *latents.shape[1:]).contiguous()
        zeros = torch.zeros(size, dtype=torch.long, device=x.device)
        try:
            times = []
            for _ in range(4):  # the first prepares
                started = time.perf_counter()
                denoiser.eps(x, zeros, zeros).sum().item()  # waits for a GPU
                times.append(time.perf_counter() - started)
                if time.perf_counter() > deadline:
                    break
        except torch.OutOfMemoryError:
            break
        rate = size / min(times)
        not_faster = 0 if rate > 1.03 * best_rate else not_faster + 1
        best_size, best_rate = (size, rate) if rate > 1.03 * best_rate else (best_size, best_rate)
        size *= 2
    return best_size
