"""The most memory that this process has had."""

from pathlib import Path

import torch


def peak_memory(device: torch.device) -> float:
    """In MiB: what torch had of the GPU, or, on a processor, the resident memory of the whole process.

    The latter by Linux's own count (VmHWM), which no sampling misses; what comes before in a process counts too.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    [peak] = [line for line in lines if line.startswith("VmHWM:")]
    return int(peak.split()[1]) / 1024
