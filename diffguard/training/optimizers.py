"""Optimizers for training."""

from collections.abc import Iterator
from functools import wraps
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffguard.errors import SettingError
from diffguard.utils.precision import has_bfloat16_units


def make_optimizer(
    kind: Literal["adamw", "muon"], network: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Make the optimizer: AdamW (arXiv 1711.05101), or Muon for matrices and convolutions with AdamW for all others.

    Muon (arXiv 2502.16982, timm's implementation) steps along the nearest orthogonal matrix of the momentum, scaled
    like a step of AdamW, so that both use one learning rate. A convolution counts as the matrix of its flattened
    filters; embeddings are left to AdamW. The orthogonal matrix is computed in bfloat16 where the device has units for
    it, else in float32.

    Raises:
        SettingError: kind is muon, and timm is not installed or too old.
    """
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    if kind == "adamw":
        return torch.optim.AdamW(weights, lr=learning_rate, weight_decay=weight_decay, fused=True)
    needed = "optimizer: muon is timm's (1.0.27 or later); pip install 'diffguard-ood[models]'"
    try:
        from timm.optim import muon
        from timm.optim.muon import Muon
    except ImportError:
        raise SettingError(needed) from None
    # In earlier versions the learning rate of AdamW's part ignores the schedule.
    if "fallback_lr_scale" not in signature(Muon).parameters:
        raise SettingError(needed)
    _choose_precision_by_device(muon)
    tables = {id(weight) for weight in _embeddings(network)}
    matrices = [weight for weight in weights if weight.ndim > 1 and id(weight) not in tables]
    others = [weight for weight in weights if weight.ndim < 2 or id(weight) in tables]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "use_fallback": True}]
    optimizer: torch.optim.Optimizer = Muon(
        [group for group in groups if group["params"]], lr=learning_rate, weight_decay=weight_decay, nesterov=True
    )
    return optimizer


def _choose_precision_by_device(muon: Any) -> None:
    """Have timm's Muon, everywhere in this process, compute in float32 where bfloat16 has no units.

    timm offers no choice: with AVX2 alone its bfloat16 makes a step of `cifar10-patch` 7.5 times as long.
    """
    plain = muon.zeropower_via_newtonschulz
    if hasattr(plain, "chooses_precision"):
        return

    @wraps(plain)
    def orthogonalize(gradient: Tensor, *arguments: Any, **options: Any) -> Tensor:
        dtype = torch.bfloat16 if has_bfloat16_units(gradient.device) else torch.float32
        orthogonal: Tensor = plain(gradient, *arguments, **{"dtype": dtype, **options})
        return orthogonal

    orthogonalize.chooses_precision = True  # type: ignore[attr-defined]
    muon.zeropower_via_newtonschulz = orthogonalize


def _embeddings(network: nn.Module) -> Iterator[Tensor]:
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            yield module.weight
