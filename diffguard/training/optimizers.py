"""Optimizers for training."""

from collections.abc import Iterator
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffguard.errors import SettingError


def make_optimizer(
    kind: Literal["adamw", "muon"], network: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Make the optimizer: AdamW (arXiv 1711.05101), or Muon for matrices and convolutions with AdamW for all others.

    Muon (arXiv 2502.16982, timm's implementation) steps along the nearest orthogonal matrix of the momentum, scaled
    like a step of AdamW, so that both use one learning rate. A convolution counts as the matrix of its flattened
    filters; embeddings are left to AdamW.

    Raises:
        SettingError: kind is muon, and timm is not installed or too old.
    """
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    if kind == "adamw":
        return torch.optim.AdamW(weights, lr=learning_rate, weight_decay=weight_decay, fused=True)
    needed = "optimizer: muon is timm's (1.0.27 or later); pip install 'diffguard-ood[models]'"
    try:
        from timm.optim.muon import Muon
    except ImportError:
        raise SettingError(needed) from None
    # In earlier versions the learning rate of AdamW's part ignores the schedule.
    if "fallback_lr_scale" not in signature(Muon).parameters:
        raise SettingError(needed)
    tables = {id(weight) for weight in _embeddings(network)}
    matrices = [weight for weight in weights if weight.ndim > 1 and id(weight) not in tables]
    others = [weight for weight in weights if weight.ndim < 2 or id(weight) in tables]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "use_fallback": True}]
    optimizer: torch.optim.Optimizer = Muon(
        [group for group in groups if group["params"]], lr=learning_rate, weight_decay=weight_decay, nesterov=True
    )
    return optimizer


def _embeddings(network: nn.Module) -> Iterator[Tensor]:
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            yield module.weight
