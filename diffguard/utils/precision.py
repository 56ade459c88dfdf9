"""Which precision is fast on a device."""

from typing import Any, Literal, TypeVar

import torch

Precision = Literal["float32", "bfloat16"]
P = TypeVar("P", bound=str)


def has_bfloat16_units(device: torch.device | str) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware: CUDA from Ampere on, or AMX, or AVX512-BF16."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    cpu: Any = torch.cpu
    if hasattr(cpu, "get_capabilities"):  # torch 2.12 and later
        capabilities = cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(cpu, name, bool)()) for name in names)


def resolve_precision(precision: P | Literal["auto"], device: torch.device | str) -> P | Precision:
    """Resolve auto to bfloat16 if the device has units for it, else float32; other precisions are returned as given."""
    if precision != "auto":
        return precision
    return "bfloat16" if has_bfloat16_units(device) else "float32"
