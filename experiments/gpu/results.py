"""What the steps of a run found: one JSON file, written whenever something is added."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch


class Results:
    """A JSON object in a file, a key for each thing that was measured; steps add to it one after the other."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.json"

    def add(self, key: str, value: Any) -> None:
        """Write it at once, beside what is there; of the same key the last counts."""
        values = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        values[key] = value
        part = self.path.with_name(".results.json.part")
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)
        print(f"{key}: {json.dumps(value)[:400]}", flush=True)


def machine() -> dict[str, Any]:
    """What it runs on."""
    import diffusers

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None,
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "diffusers": diffusers.__version__,
    }
