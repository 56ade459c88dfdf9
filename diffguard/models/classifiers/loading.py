"""Classifiers of other origins: networks of timm and torchvision by name, local checkpoints, custom code."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import nn

from diffguard.errors import DiffGuardError, ServiceError, SettingError
from diffguard.models.classifiers.files import load_classifier
from diffguard.models.classifiers.wrapped import NetworkClassifier
from diffguard.models.weights import State, check_memory, fitting, give_weights, read_weights
from diffguard.settings import ClassifierFile, LibraryClassifier, ObjectClassifier
from diffguard.utils.importing import import_object
from diffguard.utils.text import first_line

MOST_LAYERS = 1000
"""Depth beyond which arguments are refused, before a network of that depth takes the memory."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_classifier(spec: ClassifierFile | LibraryClassifier | ObjectClassifier, size: int) -> Any:
    """Load the classifier that a spec describes, on the CPU, in eval mode and frozen.

    Args:
        size: side of the images that it will be given, in pixels.

    Raises:
        SettingError: a name is unknown, or the network does not take its arguments or images of this size.
        DataError: its weights are missing, damaged, or of another network.
        ServiceError: pre-trained weights are not in the library's cache and cannot be downloaded.
    """
    if isinstance(spec, ClassifierFile):
        return load_classifier(spec.path)
    if isinstance(spec, ObjectClassifier):
        return _from_object(spec, size)
    return _from_timm(spec, size) if spec.kind == "timm" else _from_torchvision(spec, size)


def _from_object(spec: ObjectClassifier, size: int) -> Any:
    network = _call(spec.object, import_object(spec.object), spec.arguments)
    if not isinstance(network, nn.Module):
        raise SettingError(f"{spec.object}: it returned {type(network).__name__}, which is no torch.nn.Module")
    if spec.weights is not None:
        give_weights(network, read_weights(spec.weights), spec.weights, spec.object)
    if all(hasattr(network, name) for name in ("num_classes", "cam_layer", "features")):
        return network.eval().requires_grad_(False)
    return NetworkClassifier(network, spec.cam_layer, spec.mean or (0.0,), spec.std or (1.0,), size=size)


def _from_timm(spec: LibraryClassifier, size: int) -> NetworkClassifier:
    try:
        import timm
    except ImportError:
        raise SettingError(
            f"classifier {spec.name}: timm is not installed; pip install 'diffguard-ood[models]'"
        ) from None

    if not timm.is_model(spec.name.partition(".")[0]):
        raise SettingError(_unknown("timm", spec.name, timm.list_models()))

    def build(pretrained: bool, **arguments: Any) -> nn.Module:
        network: nn.Module = timm.create_model(spec.name, pretrained=pretrained, **arguments)
        return network

    network: Any = _with_weights(spec, build)
    config = network.pretrained_cfg
    input_size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    names: list[str] | None = None
    if spec.weights is None:
        from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset(network)
        # The first synonym of each class, as in torchvision.
        names = [text.partition(",")[0] for text in ImageNetInfo(subset).label_descriptions()] if subset else None
    mean, std = spec.mean or config["mean"], spec.std or config["std"]
    fixed = input_size[0] if input_size is not None and getattr(network.patch_embed, "strict_img_size", True) else None
    return _wrapped(spec, network, mean, std, size, fixed, names)


def _from_torchvision(spec: LibraryClassifier, size: int) -> NetworkClassifier:
    from torchvision import models

    if spec.name not in (known := models.list_models(module=models)):
        raise SettingError(_unknown("torchvision", spec.name, known))
    weights = models.get_model_weights(spec.name)["DEFAULT"] if spec.weights is None else None

    def build(pretrained: bool, **arguments: Any) -> nn.Module:
        network: nn.Module = models.get_model(spec.name, weights=weights if pretrained else None, **arguments)
        return network

    network: Any = _with_weights(spec, build)
    mean, std, names = IMAGENET_MEAN, IMAGENET_STD, None
    if weights is not None:
        transform = weights.transforms()
        mean, std, names = tuple(transform.mean), tuple(transform.std), weights.meta["categories"]
    return _wrapped(
        spec, network, spec.mean or mean, spec.std or std, size, getattr(network, "image_size", None), names
    )


def _wrapped(
    spec: LibraryClassifier,
    network: nn.Module,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    size: int,
    fixed: int | None,
    names: list[str] | None,
) -> NetworkClassifier:
    channels = next((layer.in_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)), len(mean))
    if len(mean) not in (1, channels):
        # The library's normalization is for RGB; a grayscale network is given its average.
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return NetworkClassifier(
        network, spec.cam_layer, mean, std, size=fixed or size, fixed=fixed is not None, class_names=names
    )


def _with_weights(spec: LibraryClassifier, build: Callable[..., nn.Module]) -> nn.Module:
    """Build a library's network with its pre-trained weights, or with those of a local checkpoint."""
    where = f"classifier {spec.kind} {spec.name}"
    for key, value in spec.arguments.items():
        numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
        if ("depth" in key or "layers" in key or "blocks" in key) and sum(numbers) > MOST_LAYERS:
            raise SettingError(f"{where}: arguments: {key} {value}; no network has more than {MOST_LAYERS} layers")
    if spec.weights is not None:
        return _from_checkpoint(spec, build, where)
    if spec.num_classes is not None:
        raise SettingError(f"{where}: num_classes is of a checkpoint; give weights, or leave it out")
    try:
        if spec.arguments:
            with torch.device("meta"):
                usual = sum(value.numel() for value in build(pretrained=False).state_dict().values())
            check_memory(partial(build, pretrained=False, **spec.arguments), usual, where)
        return build(pretrained=True, **spec.arguments)
    except DiffGuardError:
        raise
    except (TypeError, RuntimeError) as error:
        raise SettingError(f"{where}: {first_line(error)}") from None
    except Exception as error:  # a download raises exceptions of urllib, httpx or the hub
        raise ServiceError(
            f"{where}: its pre-trained weights cannot be fetched ({first_line(error)}); "
            "give a local checkpoint as weights"
        ) from None


def _from_checkpoint(spec: LibraryClassifier, build: Callable[..., nn.Module], where: str) -> nn.Module:
    """Build a network with the weights of a local checkpoint, and with as many labels as its last layer has."""
    assert spec.weights is not None
    state: State = read_weights(spec.weights)
    classes = {} if spec.num_classes is None else {"num_classes": spec.num_classes}
    untrained = partial(build, pretrained=False, **classes, **spec.arguments)
    try:
        check_memory(untrained, sum(value.numel() for value in state.values()), f"{spec.weights}: {where}")
        network = untrained()
        state = fitting(state, lambda names: len(network.state_dict().keys() & names.keys()))
        head = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
        rows = len(state.get(f"{head}.weight", ())) or None
        if spec.num_classes is None and rows is not None and rows != network.get_submodule(head).out_features:
            network = build(pretrained=False, num_classes=rows, **spec.arguments)
    except (TypeError, RuntimeError, IndexError) as error:
        raise SettingError(f"{where}: it cannot be built ({first_line(error)})") from None
    give_weights(network, state, spec.weights, where)
    return network


def _call(name: str, factory: Any, arguments: dict[str, Any]) -> Any:
    try:
        return factory(**arguments)
    except (TypeError, ValueError) as error:
        raise SettingError(f"{name}: it cannot be called with {sorted(arguments)} ({first_line(error)})") from None


def _unknown(library: str, name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"classifier: {library} has no {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
