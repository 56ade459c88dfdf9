"""The networks of a denoiser's folder, each of the class that its family is written for, with all of its weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffguard.errors import DataError
from diffguard.models.weights import check_finite, check_weights, fitting, give_weights, read_folder, read_weights
from diffguard.utils.text import first_line

N = TypeVar("N", bound=nn.Module)

_FORMER_NAMES = {"DiTTransformer2DModel": ("Transformer2DModel",)}
"""What a class was called in folders that older versions of Diffusers wrote."""

_MOST_SIDE = 4096
_MOST_TOKENS_SIDE = 512
"""Of a transformer's latents: it holds an embedding of every place."""

_MOST_TEXT_LAYERS = 200

TEXT_PARTS = {
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast"),
    "text_encoder": ("CLIPTextModel", "T5EncoderModel"),
}
"""Classes of transformers that a text-conditioned model may be of."""


def open_part(kind: type[N], folder: Path) -> N:
    """A network of Diffusers.

    Raises:
        DataError: the folder holds none, or one of another class, or its weights are not those of its configuration.
    """
    network: Any = kind
    config = read_config(folder / "config.json")
    name = config.get("_class_name", kind.__name__)
    if name not in (kind.__name__, *_FORMER_NAMES.get(kind.__name__, ())):
        raise DataError(f"{folder}: a {name}, where a denoiser of this kind has a {kind.__name__}")
    state, source = read_folder(folder)
    _check_sizes(config, len(state), folder / "config.json", kind.__name__)
    try:
        # Without memory first: what the configuration claims is held to what the file has.
        with torch.device("meta"):
            empty = network.from_config(dict(config))
    except Exception as error:  # whatever Diffusers raises for a value of the wrong kind
        raise DataError(f"{folder / 'config.json'}: no network can be made of it ({first_line(error)})") from None
    shapes = {key: value.shape for key, value in empty.state_dict().items()}
    named = dict(fitting(state, lambda names: len(shapes.keys() & names.keys())))
    # Attention under its old names, as in the first models on the hub; Diffusers' own loading does the same.
    empty._fix_state_dict_keys_on_load(named)
    check_weights(named, shapes, source, f"the {kind.__name__} of config.json")
    del empty
    made: N = network.from_config(dict(config))
    give_weights(made, named, source, kind.__name__)
    return made


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a network.

    Raises:
        DataError: it is missing or none.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a part of the denoiser is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not the configuration of a network ({first_line(error)})") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: not the configuration of a network")
    # As a list of two, which Diffusers' own classes write too.
    if isinstance(sides := config.get("sample_size"), list):
        if len(set(map(str, sides))) != 1:
            raise DataError(f"{path}: sample_size: {sides} is not square; images here are")
        config["sample_size"] = sides[0]
    return config


def _check_sizes(config: Mapping[str, Any], tensors: int, path: Path, kind: str) -> None:
    """See that a configuration does not ask for more than its weights could fill, before any of it is made."""
    most = _MOST_TOKENS_SIDE if kind == "DiTTransformer2DModel" else _MOST_SIDE
    side = config.get("sample_size")
    if side is not None and not (isinstance(side, int) and 1 <= side <= most):
        raise DataError(f"{path}: sample_size: {side!r} is not within 1..{most}")
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        if len(values) > max(tensors, 16):
            raise DataError(f"{path}: {key}: {len(values)} values, and the weights are {tensors} tensors")
        for number in values:
            if "layers" in key and isinstance(number, int) and number > tensors:
                raise DataError(f"{path}: {key}: {number} layers, and the weights are {tensors} tensors")


def _check_text_part(path: Path) -> None:
    """Raise a DataError if a text encoder's configuration asks for code from a hub, or for endless layers."""
    config = read_config(path)
    attention = [config.get(key) for key in ("attn_implementation", "_attn_implementation")]
    if strange := [name for name in attention if name not in (None, "eager", "sdpa")]:
        raise DataError(f"{path}: attention by {strange[0]!r}, which is fetched as code; only eager and sdpa are not")
    if asked := [key for key in ("auto_map", "quantization_config") if config.get(key)]:
        raise DataError(f"{path}: {asked[0]}: code or a package that the file chooses; take the plain model")
    for key in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
        if not isinstance(layers := config.get(key, 0) or 0, int) or not 0 <= layers <= _MOST_TEXT_LAYERS:
            raise DataError(f"{path}: {key}: {layers!r} is not within 0..{_MOST_TEXT_LAYERS}")


def open_text_parts(folder: Path) -> tuple[Any, Any]:
    """The tokenizer and the text encoder of a folder with model_index.json.

    Raises:
        DataError: one is missing, of a class that is none of `TEXT_PARTS`, or its weights do not fit.
    """
    import transformers

    index = read_config(folder / "model_index.json")
    _check_text_part(folder / "text_encoder" / "config.json")
    opened = []
    for part, known in TEXT_PARTS.items():
        named = index.get(part)
        name = named[1] if isinstance(named, list) and len(named) == 2 else named
        if name not in known:
            raise DataError(f"{folder / 'model_index.json'}: {part}: {name} is not one of {', '.join(known)}")
        if part == "tokenizer":
            opened.append(getattr(transformers, name).from_pretrained(folder / part, local_files_only=True))
            continue
        encoder, told = getattr(transformers, name).from_pretrained(
            folder / part, local_files_only=True, output_loading_info=True
        )
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := sorted(map(str, told.get(what) or ())):
                raise DataError(
                    f"{folder / part}: the weights do not fit {name}: {len(keys)} {what.replace('_', ' ')}: "
                    f"{', '.join(keys[:3])}"
                )
        check_finite(encoder.state_dict(), folder / part)
        opened.append(encoder.eval())
    return opened[0], opened[1]


def read_tensor(path: Path, name: str, shape: tuple[int | None, ...]) -> Tensor:
    """A tensor of a safetensors file, of these sides; None: any.

    Raises:
        DataError: it is missing, or of other sides.
    """
    state = read_weights(path)
    if name not in state:
        raise DataError(f"{path}: it has no tensor {name!r}, but {', '.join(sorted(state)[:3])}")
    sides = tuple(state[name].shape)
    if len(sides) != len(shape) or any(wanted not in (None, side) for wanted, side in zip(shape, sides, strict=True)):
        wanted = ", ".join("any" if side is None else str(side) for side in shape)
        raise DataError(f"{path}: {name} has the shape {sides} in place of ({wanted})")
    check_finite({name: state[name]}, path)
    return state[name]
