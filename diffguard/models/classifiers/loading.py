"""Classifiers from elsewhere: networks of timm and torchvision by name, local checkpoints, one's own code."""

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
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_classifier(spec: ClassifierFile | LibraryClassifier | ObjectClassifier, size: int) -> Any:
    """The classifier that a spec names, on the CPU, in eval mode and frozen.

    Args:
        size: side in pixels of the images that it will be given.

    Raises:
        SettingError: a name is unknown, or the network does not take its arguments or such images.
        DataError: its weights are missing, damaged, or of another network.
        ServiceError: pre-trained weights are not in the library's cache and cannot be downloaded.
    """
    if isinstance(spec, ClassifierFile):
        return load_classifier(spec.path)
    if isinstance(spec, ObjectClassifier):
        return _of_object(spec, size)
    return _of_timm(spec, size) if spec.kind == "timm" else _of_torchvision(spec, size)


def _of_object(spec: ObjectClassifier, size: int) -> Any:
    made = _call(spec.object, import_object(spec.object), spec.arguments)
    if not isinstance(made, nn.Module):
        raise SettingError(f"{spec.object}: it returned {type(made).__name__}, which is no torch.nn.Module")
    if spec.weights is not None:
        give_weights(made, read_weights(spec.weights), spec.weights, spec.object)
    if all(hasattr(made, name) for name in ("num_classes", "cam_layer", "features")):
        return made.eval().requires_grad_(False)
    return NetworkClassifier(made, spec.cam_layer, spec.mean or (0.0,), spec.std or (1.0,), size=size)


def _of_timm(spec: LibraryClassifier, size: int) -> NetworkClassifier:
    try:
        import timm
    except ImportError:
        raise SettingError(
            f"classifier {spec.name}: timm is not installed; pip install 'diffguard-ood[models]'"
        ) from None

    if not timm.is_model(spec.name.partition(".")[0]):
        raise SettingError(_unknown("timm", spec.name, timm.list_models()))

    def make(pretrained: bool, **arguments: Any) -> nn.Module:
        network: nn.Module = timm.create_model(spec.name, pretrained=pretrained, **arguments)
        return network

    network: Any = _made(spec, make)
    config = network.pretrained_cfg
    tokens = getattr(getattr(network, "patch_embed", None), "img_size", None)
    names: list[str] | None = None
    if spec.weights is None:
        from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset(network)
        # Of a class's synonyms the first, as torchvision has them.
        names = [each.partition(",")[0] for each in ImageNetInfo(subset).label_descriptions()] if subset else None
    mean, std = spec.mean or config["mean"], spec.std or config["std"]
    fixed = tokens[0] if tokens is not None and getattr(network.patch_embed, "strict_img_size", True) else None
    return _wrapped(spec, network, mean, std, size, fixed, names)


def _of_torchvision(spec: LibraryClassifier, size: int) -> NetworkClassifier:
    from torchvision import models

    if spec.name not in (known := models.list_models(module=models)):
        raise SettingError(_unknown("torchvision", spec.name, known))
    weights = models.get_model_weights(spec.name)["DEFAULT"] if spec.weights is None else None

    def make(pretrained: bool, **arguments: Any) -> nn.Module:
        network: nn.Module = models.get_model(spec.name, weights=weights if pretrained else None, **arguments)
        return network

    network: Any = _made(spec, make)
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
    channels = next((each.in_channels for each in network.modules() if isinstance(each, nn.Conv2d)), len(mean))
    if len(mean) not in (1, channels):
        # The library's numbers are of RGB; a grayscale network gets their average.
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return NetworkClassifier(
        network, spec.cam_layer, mean, std, size=fixed or size, fixed=fixed is not None, class_names=names
    )


def _made(spec: LibraryClassifier, make: Callable[..., nn.Module]) -> nn.Module:
    """A library's network with its own pre-trained weights, or with those of a local checkpoint."""
    where = f"classifier {spec.kind} {spec.name}"
    for key, value in spec.arguments.items():
        numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
        if ("depth" in key or "layers" in key or "blocks" in key) and sum(numbers) > MOST_LAYERS:
            raise SettingError(f"{where}: arguments: {key} {value}; no network has more than {MOST_LAYERS} layers")
    classes = {} if spec.num_classes is None else {"num_classes": spec.num_classes}
    if spec.weights is None:
        if spec.num_classes is not None:
            raise SettingError(f"{where}: num_classes is of a checkpoint; give weights, or leave it out")
        try:
            if spec.arguments:
                with torch.device("meta"):
                    usual = sum(value.numel() for value in make(pretrained=False).state_dict().values())
                check_memory(partial(make, pretrained=False, **spec.arguments), usual, where)
            return make(pretrained=True, **spec.arguments)
        except DiffGuardError:
            raise
        except (TypeError, RuntimeError) as error:
            raise SettingError(f"{where}: {first_line(error)}") from None
        except Exception as error:  # whatever a download raises: of urllib, of httpx, of the hub
            raise ServiceError(
                f"{where}: its pre-trained weights cannot be fetched ({first_line(error)}); "
                "give a local checkpoint as weights"
            ) from None
    state: State = read_weights(spec.weights)
    build = partial(make, pretrained=False, **classes, **spec.arguments)
    try:
        check_memory(build, sum(value.numel() for value in state.values()), f"{spec.weights}: {where}")
        network = build()
        state = fitting(state, lambda names: len(network.state_dict().keys() & names.keys()))
        head = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
        rows = len(state.get(f"{head}.weight", ())) or None
        if spec.num_classes is None and rows is not None and rows != network.get_submodule(head).out_features:
            network = make(pretrained=False, num_classes=rows, **spec.arguments)
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
