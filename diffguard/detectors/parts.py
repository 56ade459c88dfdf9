"""What a detector of pytorch-ood gets of a classifier: what stands in its model's place, and parts of it by name."""

import inspect
import typing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diffguard.errors import SettingError
from diffguard.models.modules import find_module
from diffguard.settings import Baseline


def view(sees: str, classifier: Any) -> Any:
    """Return the function from images [B, C, H, W] in [0, 1] to what a baseline sees of them.

    That is logits [B, K], features [B, D], pixels [B, C * H * W], or the images as they are.
    """
    return VIEWS[sees](classifier)


VIEWS: dict[str, Callable[[Any], Any]] = {
    "logits": lambda classifier: classifier,
    "features": lambda classifier: classifier.features,
    "pixels": lambda classifier: nn.Flatten(),
    "images": lambda classifier: nn.Identity(),
}
"""By the name that settings have, what stands in the place of a detector's model and can be stored of images."""


def stored_view(baseline: Baseline) -> str:
    """What is stored of the train split for a baseline, a name in `VIEWS`: images, where it sees inner layers."""
    if baseline.sees in VIEWS and baseline.layer is None:
        return baseline.sees
    return "images"


class Parts:
    """The parts of a classifier that one baseline is built of.

    Args:
        baseline: the detector and what it sees.
        classifier: on the device where images are scored.
        image_shape: (channels, height, width) of the images; None: unknown, which is enough for a baseline that
            takes neither a head nor maps.
        stored: whether it is fitted on stored views (`stored_view`), see `reading_stored`.
    """

    def __init__(
        self,
        baseline: Baseline,
        classifier: Any,
        image_shape: tuple[int, int, int] | None = None,
        *,
        stored: bool = False,
    ) -> None:
        self.baseline, self.classifier, self._shape = baseline, classifier, image_shape
        self._takes_maps = False
        self._see = _Switch(view(baseline.sees, classifier)) if stored and stored_view(baseline) != "images" else None

    def arguments(self, factory: Callable[..., Any]) -> tuple[list[Any], dict[str, Any]]:
        """The positional and keyword arguments of a detector's constructor.

        The first parameter is its model: what the baseline sees. Where it is annotated as a list, it is the network
        in consecutive parts. Parameters that are named in `PARTS`, without a default or with None, are given too,
        unless the settings give them.

        Raises:
            SettingError: the classifier has no such part; one line that says what to choose.
        """
        parameters, given, sees = inspect.signature(factory).parameters, self.baseline.arguments, self.baseline.sees
        first = next(iter(parameters), "")
        self._takes_maps = sees == "features" and first == "backbone"
        parts = dict[str, Any]()
        for name, part in PARTS.items():
            if name not in parameters or name in given:
                continue
            if sees in part.sees and parameters[name].default in (inspect.Parameter.empty, None):
                parts[name] = part.make(self)
            elif parameters[name].default is inspect.Parameter.empty:
                raise SettingError(
                    f"{self.baseline.detector} takes {name}, which there is of sees: {' or '.join(part.sees)}, not of "
                    f"{sees}"
                )
        model = [] if first in parts else [self._model(is_list=_is_list(factory, first))]
        return model, {**parts, **given}

    @contextmanager
    def reading_stored(self) -> Iterator[None]:
        """Meanwhile a detector's model passes on what it is given, which is what it sees already."""
        if self._see is not None:
            self._see.is_stored = True
        try:
            yield
        finally:
            if self._see is not None:
                self._see.is_stored = False

    def _model(self, *, is_list: bool) -> Any:
        if self.baseline.sees == "maps":
            return _Part(self.classifier, None, self._layers[0])
        if self.baseline.sees == "layers":
            return self.consecutive if is_list else _WithGradient(self.classifier)
        return _AsMaps(self.see) if self._takes_maps else self.see

    @property
    def see(self) -> Any:
        """From images to logits, features, pixels or images."""
        if self._see is not None:
            return self._see
        if self.baseline.sees == "features" and self.baseline.layer is not None:
            return _Pooled(self.classifier, module_of(self.classifier, self.baseline.layer))
        return view(self.baseline.sees, self.classifier)

    @cached_property
    def linear(self) -> nn.Linear:
        """The classifier's last Linear layer, once it is known to make its logits of the features.

        Raises:
            SettingError: it does not, or there is none.
        """
        last = self._last_linear
        see = self.see if self.baseline.sees == "features" else self.classifier.features
        images, logits = self._example
        with torch.no_grad():
            features = see(images)
        if last is None or not _gives(last, features, logits):
            advice = "leave out layer" if self.baseline.layer else "choose sees: maps, or a detector that takes no head"
            raise SettingError(
                f"the last Linear layer of {_name_of(self.classifier)} does not make its logits of these features, so "
                f"that there is no head, w or b; {advice}"
            )
        return last

    @property
    def bias(self) -> Tensor:
        """Of `linear`; zeros where it has none."""
        bias = self.linear.bias
        return self.linear.weight.new_zeros(self.linear.out_features) if bias is None else bias.detach()

    @cached_property
    def head(self) -> nn.Module:
        """From what the detector sees to logits [B, num_classes].

        Of features it is the last Linear layer. Of maps it is their mean over space and that layer, where these make
        the logits of an image; else the rest of the network, see `_Part`.

        Raises:
            SettingError: neither makes the logits.
        """
        if self.baseline.sees == "features":
            return nn.Sequential(nn.Flatten(), self.linear) if self._takes_maps else self.linear
        layer, (images, logits), last = self._layers[-1], self._example, self._last_linear
        with torch.no_grad():
            maps = _Part(self.classifier, None, layer)(images)
        rest = _Part(self.classifier, layer, None, self._shape)
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *([] if last is None else [last]))
        rest_fits, pooled_fits = _gives(rest, maps, logits), _gives(pooled, maps, logits)
        if rest_fits and pooled_fits:
            # Detectors change maps; the two must be the same function of these as well.
            noise = torch.randn(maps.shape, generator=torch.Generator().manual_seed(1)).to(maps)
            with torch.no_grad():
                pooled_fits = _gives(pooled, noise, rest(noise))
        if pooled_fits:
            return pooled
        if rest_fits:
            return rest
        raise SettingError(
            f"{_name_of(self.classifier)} does not make its logits of the maps of {layer.name} alone; choose a later "
            "layer, or sees: features"
        )

    @property
    def modules(self) -> list[nn.Module]:
        """The named layers, to hook."""
        return [module_of(self.classifier, name) for name in self._layer_names]

    @cached_property
    def consecutive(self) -> list[nn.Module]:
        """The network in parts: from images to the first layer's maps, and from those of each to those of the next.

        Raises:
            SettingError: the parts one after another do not make what the network makes.
        """
        layers = self._layers
        parts: list[nn.Module] = [
            _Part(self.classifier, before, layer, self._shape)
            for before, layer in zip((None, *layers), layers, strict=False)
        ]
        images, _ = self._example
        maps = images
        for part, layer in zip(parts, layers, strict=True):
            with torch.no_grad():
                expected = _Part(self.classifier, None, layer)(images)
            if not _gives(part, maps, expected):
                raise SettingError(
                    f"{_name_of(self.classifier)} does not make the maps of {layer.name} of those of the layer before "
                    "it in layers alone; name other layers, in the network's order"
                )
            maps = expected
        return parts

    @cached_property
    def _example(self) -> tuple[Tensor, Tensor]:
        """Two images of noise, and their logits."""
        if self._shape is None:
            raise SettingError("it is checked on images of the classifier's shape; give image_shape")
        device = next(self.classifier.parameters()).device
        images = torch.rand(2, *self._shape, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad():
            return images, self.classifier(images)

    @property
    def _last_linear(self) -> nn.Linear | None:
        linears = [module for module in self.classifier.modules() if isinstance(module, nn.Linear)]
        return linears[-1] if linears else None

    @property
    def _layer_names(self) -> tuple[str | None, ...]:
        return self.baseline.layers or (self.baseline.layer,)

    @cached_property
    def _layers(self) -> list["_Layer"]:
        """The named layers, whose outputs are maps.

        Raises:
            SettingError: an output is something else.
        """
        layers, (images, _) = [], self._example
        for name in self._layer_names:
            module = module_of(self.classifier, name)
            with torch.no_grad():
                output = _output_of(self.classifier, module, images)
            if output.ndim != 4:
                raise SettingError(
                    f"{name or 'cam_layer'} of {_name_of(self.classifier)} outputs {list(output.shape)}, no feature "
                    "maps [B, C, H, W]; choose sees: features, or name a layer that outputs maps"
                )
            layers.append(_Layer(name or "cam_layer", module, _is_channels_last(output)))
        return layers


@dataclass(frozen=True)
class Part:
    """A part of a classifier that a constructor gets by a parameter's name.

    Attributes:
        make: makes it.
        sees: of which baselines, by what they see.
    """

    make: Callable[[Parts], Any]
    sees: tuple[str, ...] = ("features", "maps", "layers")


PARTS = {
    "head": Part(lambda parts: parts.head),
    "w": Part(lambda parts: parts.linear.weight.detach()),
    "b": Part(lambda parts: parts.bias),
    "layers": Part(lambda parts: parts.modules, ("maps", "layers")),
    "feature_layers": Part(lambda parts: parts.consecutive, ("maps", "layers")),
    "num_classes": Part(lambda parts: parts.classifier.num_classes, ("logits", "features", "maps", "layers")),
}
"""By parameter name: the head (of features an nn.Linear), its weight [K, D] and bias [K], layers as modules to hook,
layers as consecutive parts of the network, and the number of classes K."""


def module_of(classifier: Any, name: str | None) -> nn.Module:
    """A classifier's module by its dotted name, in the wrapped network as in a printed one; None: the ``cam_layer``.

    Raises:
        SettingError: there is none of that name.
    """
    if name is None:
        module: nn.Module = classifier.cam_layer
        return module
    return find_module(_network_of(classifier), name, "layer", _name_of(classifier))


def _network_of(classifier: Any) -> nn.Module:
    network = getattr(classifier, "network", None)
    module: nn.Module = network if isinstance(network, nn.Module) else classifier
    return module


def _name_of(classifier: Any) -> str:
    return type(_network_of(classifier)).__name__


@dataclass(frozen=True)
class _Layer:
    """A layer that outputs maps.

    Attributes:
        is_channels_last: whether they are [B, H, W, C], as in timm's Swin.
    """

    name: str
    module: nn.Module
    is_channels_last: bool

    def to_maps(self, output: Tensor) -> Tensor:
        # Contiguous: some detectors take views of them.
        return (output.permute(0, 3, 1, 2) if self.is_channels_last else output).contiguous()

    def to_output(self, maps: Tensor) -> Tensor:
        return maps.permute(0, 2, 3, 1) if self.is_channels_last else maps


class _Part(nn.Module):
    """A part of a classifier: from images or a layer's maps to a later layer's maps, or to logits.

    It runs the whole classifier. A hook puts the given maps in the place of the first layer's output, so that what is
    before it is computed in vain, of blank images.
    """

    def __init__(
        self,
        classifier: nn.Module,
        first: _Layer | None,
        last: _Layer | None,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.classifier, self.first, self.last, self._shape = classifier, first, last, image_shape

    def forward(self, x: Tensor) -> Tensor:
        images, first = x, self.first
        with ExitStack() as stack:
            if first is not None:
                assert self._shape is not None
                images = x.new_zeros(len(x), *self._shape)
                # A copy: the network may work in place.
                hook = first.module.register_forward_hook(lambda *_: first.to_output(x).clone())
                stack.callback(hook.remove)
            if self.last is not None:
                return self.last.to_maps(_output_of(self.classifier, self.last.module, images))
            logits: Tensor = self.classifier(images)
            return logits


class _Pooled(nn.Module):
    """From images to a layer's output [B, D], its mean over space or tokens."""

    def __init__(self, classifier: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.classifier, self.layer = classifier, layer

    def forward(self, images: Tensor) -> Tensor:
        output = _output_of(self.classifier, self.layer, images)
        if output.ndim == 4:
            return output.mean(dim=(1, 2) if _is_channels_last(output) else (2, 3))
        return output.mean(dim=1) if output.ndim == 3 else output.flatten(1)


class _AsMaps(nn.Module):
    """Features as maps of one pixel, [B, D, 1, 1]."""

    def __init__(self, see: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        # In a tuple, so that it is no submodule: it is on its device already, and shared.
        self._see = (see,)

    def forward(self, images: Tensor) -> Tensor:
        return self._see[0](images)[:, :, None, None]


class _WithGradient(nn.Module):
    """A classifier whose layers have gradients although its weights are frozen: the graph starts at the images."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(images if images.requires_grad else images.detach().requires_grad_())
        return logits


class _Switch(nn.Module):
    """A view that passes its input on while a detector is fitted on stored views."""

    def __init__(self, see: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.is_stored = False
        # In a tuple, so that it is no submodule: it is on its device already, and shared.
        self._see = (see,)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.is_stored else self._see[0](x)


def _output_of(classifier: nn.Module, module: nn.Module, images: Tensor) -> Tensor:
    """What a module outputs when a classifier is given images.

    Raises:
        SettingError: it is not evaluated, or outputs no tensor.
    """
    outputs: list[Any] = []
    # A copy, for a tensor: what comes after may work in place.
    hook = module.register_forward_hook(
        lambda _, __, output: outputs.append(output.clone() if isinstance(output, Tensor) else output)
    )
    try:
        classifier(images)
    finally:
        hook.remove()
    if not outputs or not isinstance(outputs[-1], Tensor):
        raise SettingError(f"layer: {type(module).__name__} of {_name_of(classifier)} outputs no tensor")
    return outputs[-1]


def _is_channels_last(output: Tensor) -> bool:
    """Whether maps are [B, H, H, C]; as GradCAM takes them."""
    _, first, second, last = output.shape
    return first == second != last


@torch.no_grad()
def _gives(part: nn.Module, inputs: Tensor, expected: Tensor) -> bool:
    """Whether a part makes this of its inputs, but for rounding."""
    try:
        output = part(inputs)
    except (RuntimeError, ValueError, AssertionError, SettingError):  # of another shape
        return False
    tolerance = 1e-3 * float(expected.abs().max())
    return output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-3, atol=tolerance)


def _is_list(factory: Callable[..., Any], parameter: str) -> bool:
    """Whether a constructor's parameter is annotated as a list."""
    try:
        kind = inspect.signature(factory, eval_str=True).parameters[parameter].annotation
    except (AttributeError, KeyError, NameError, SyntaxError, TypeError):  # none, or text that names what is not there
        return False
    return typing.get_origin(kind) is list
