"""Modules of a network by their dotted names."""

from torch import nn

from diffguard.errors import SettingError


def find_module(network: nn.Module, name: str, setting: str, owner: str) -> nn.Module:
    """A module of a network by its dotted name.

    Args:
        setting, owner: what named it, and whose network it is; for the message.

    Raises:
        SettingError: there is none of that name; the message lists those at the top.
    """
    modules: dict[str, nn.Module] = dict(network.named_modules())
    if name not in modules:
        names = ", ".join(other for other in modules if other and "." not in other) or "none"
        raise SettingError(f"{setting}: {owner} has no module {name!r}; it has {names}")
    return modules[name]
