"""Denoisers in folders of Diffusers' layout and on the Hugging Face hub: saved, loaded, fitted to one's classes."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffguard.errors import DataError, DiffGuardError, ServiceError, SettingError
from diffguard.models.denoisers.dit import TransformerDenoiser
from diffguard.models.denoisers.latent import EMBEDDER_FILE, LatentDenoiser, label_embedder
from diffguard.models.denoisers.parts import open_part, open_text_parts
from diffguard.models.denoisers.patched import PATCH_FILE, PatchedDenoiser, patch_of
from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.models.denoisers.relabeled import LABELS_FILE, RelabeledDenoiser
from diffguard.models.denoisers.scheduler import CONFIG_FILE, open_scheduler
from diffguard.models.denoisers.text import PROMPTS_FILE, TextDenoiser
from diffguard.models.weights import check_finite, read_weights
from diffguard.settings import ObjectDenoiser, PretrainedDenoiser
from diffguard.utils.importing import import_object
from diffguard.utils.text import first_line


def save_denoiser(denoiser: Any, folder: str | Path) -> None:
    """Write the folder that `load_denoiser` reads, in Diffusers' layout, whole or not at all.

    unet/ (or transformer/) and scheduler/; a latent model also vqvae/ and class_embedder/, or vae/ and,
    prompted, prompts/.

    Raises:
        SettingError: it is one's own denoiser, and has no method save.
    """
    if not hasattr(denoiser, "save"):
        raise SettingError(f"denoiser: {type(denoiser).__name__} has no method save(folder)")
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        made.chmod(0o755)
        denoiser.save(made)
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def load_denoiser(folder: str | Path, patch: int | None = None) -> Any:
    """Load a denoiser from a folder in Diffusers' layout, or one that `save_denoiser` wrote.

    Its parts tell its kind: a UNet alone works on pixels (its files may lie in the folder itself), with
    vqvae/ and class_embedder/ it is a latent model; transformer/ and vae/ make a diffusion transformer. A
    text-conditioned model needs to know its prompts: see `open_denoiser`.

    Args:
        patch: of a UNet on patches of pixels, their side; None: it follows from its channels (48 are RGB images in
            patches of 4x4, 12 in patches of 2x2).

    Raises:
        DataError: the folder or a part of it is missing, or is not such a model.
        SettingError: the patch does not follow from the channels, or does not fit them.
    """
    return _load(Path(folder), None, patch)


def open_denoiser(spec: PretrainedDenoiser | ObjectDenoiser, classes: Sequence[str]) -> Any:
    """The denoiser that a spec names, for a classifier of these classes.

    Args:
        classes: their names, in the order of the labels.

    Raises:
        DataError: the folder or a part of it is missing, or is not such a model.
        SettingError: it knows fewer or more labels, or one's own code is not a denoiser.
        ServiceError: the hub cannot be reached.
    """
    if isinstance(spec, ObjectDenoiser):
        where, opened = spec.object, _of_object(spec)
    else:
        where, opened = spec.path, _load(_local(spec.path), (spec, list(classes)), spec.patch)
    if spec.labels is not None:
        return _relabeled(opened, spec.labels, classes, where)
    if opened.num_labels and opened.num_labels != len(classes):
        raise SettingError(
            f"denoiser {where}: it knows {opened.num_labels} labels, the benchmark has {len(classes)} classes; "
            "give labels: the denoiser's label of each class, in order"
        )
    return opened


def _relabeled(denoiser: Any, labels: Sequence[int], classes: Sequence[Any], where: str) -> RelabeledDenoiser:
    if not denoiser.num_labels:
        raise SettingError(f"denoiser {where}: labels are given, and it takes none")
    if len(labels) != len(classes):
        raise SettingError(f"denoiser {where}: labels: {len(labels)} are given for {len(classes)} classes")
    if wrong := [each for each in labels if not isinstance(each, int) or not 0 <= each < denoiser.num_labels]:
        raise SettingError(f"denoiser {where}: labels: {wrong[0]!r} is not within 0..{denoiser.num_labels - 1}")
    return RelabeledDenoiser(denoiser, labels)


def _of_object(spec: ObjectDenoiser) -> Any:
    factory = import_object(spec.object)
    try:
        made = factory(**spec.arguments)
    except (TypeError, ValueError) as error:
        reason = first_line(error)
        raise SettingError(f"{spec.object}: it cannot be called with {sorted(spec.arguments)} ({reason})") from None
    asked = ("alphas_cumprod", "num_labels", "null_label", "image_shape", "device", "to", "encode", "decode", "eps")
    if lacking := [name for name in asked if not hasattr(made, name)]:
        raise SettingError(f"{spec.object}: it is no denoiser: {type(made).__name__} has no {lacking[0]}")
    return made


def is_id(path: str) -> bool:
    """Whether it is the id of a model on a hub by its form, as in ``facebook/DiT-XL-2-256``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None


def _local(path: str) -> Path:
    """A model's folder; of a hub id, where the hub's cache has it, downloaded if need be."""
    if Path(path).is_dir():
        return Path(path)
    if not is_id(path):
        raise DataError(f"{path}: no such folder of a denoiser")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(path, safety_checker=None))
    except Exception as error:  # whatever a download raises: of httpx, of the hub
        raise ServiceError(
            f"denoiser {path}: the Hugging Face hub cannot be reached for it ({first_line(error)}); download it "
            "where there is a network, and give its folder as path"
        ) from None


def _load(folder: Path, prompted: tuple[PretrainedDenoiser, list[str]] | None, patch: int | None) -> Any:
    # Old pixel models have their files in the folder itself.
    places = [folder / "scheduler", folder]
    place = next((each for each in places if (each / CONFIG_FILE).is_file()), None)
    if place is None:
        raise DataError(
            f"{folder}: no denoiser here (scheduler/{CONFIG_FILE} is missing); train one, or name its folder"
        )
    try:
        loaded = _load_parts(folder, open_scheduler(place), prompted, patch)
        if (folder / LABELS_FILE).is_file():
            labels = json.loads((folder / LABELS_FILE).read_text(encoding="utf-8"))
            return _relabeled(loaded, labels, labels, str(folder / LABELS_FILE))
        return loaded
    except DiffGuardError as error:
        raise type(error)(f"{folder}: {error}" if str(folder) not in str(error) else str(error)) from None
    except Exception as error:  # whatever Diffusers raises for a folder that is none of its own
        raise DataError(f"{folder}: the denoiser cannot be loaded: {first_line(error)}") from error


def _load_parts(
    folder: Path, scheduler: Any, prompted: tuple[PretrainedDenoiser, list[str]] | None, patch: int | None
) -> Any:
    from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel, VQModel

    size = prompted[0].size if prompted is not None else None
    if (folder / "transformer").is_dir():
        transformer = open_part(DiTTransformer2DModel, folder / "transformer")
        made: Any = TransformerDenoiser(transformer, open_part(AutoencoderKL, folder / "vae"), scheduler)
    elif (folder / "vqvae").is_dir():
        if not (folder / EMBEDDER_FILE).is_file():
            raise DataError(f"{folder}: a latent model without {EMBEDDER_FILE}, the embeddings of its labels")
        unet: Any = open_part(UNet2DConditionModel, folder / "unet")
        weight = _tensor(folder / EMBEDDER_FILE, "weight", (None, unet.config.cross_attention_dim))
        vqvae = open_part(VQModel, folder / "vqvae")
        made = LatentDenoiser(unet, vqvae, label_embedder(weight), scheduler)
    elif (folder / "vae").is_dir():
        unet = open_part(UNet2DConditionModel, folder / "unet")
        if unet.config.addition_embed_type is not None:
            raise DataError(
                f"{folder}: it asks for more than a prompt ({unet.config.addition_embed_type}), as SDXL does"
            )
        vae = open_part(AutoencoderKL, folder / "vae")
        if (folder / PROMPTS_FILE).is_file():
            embeddings = _tensor(folder / PROMPTS_FILE, "embeddings", (None, None, unet.config.cross_attention_dim))
            return TextDenoiser(unet, vae, embeddings, scheduler, _prompts_size(folder / PROMPTS_FILE))
        if prompted is None:
            raise DataError(f"{folder}: a text-conditioned model has to be opened with the names of classes")
        return TextDenoiser(unet, vae, _embedded(folder, *prompted), scheduler, size)
    else:
        unet = open_part(UNet2DModel, folder / "unet" if (folder / "unet").is_dir() else folder)
        if unet.config.class_embed_type is not None:
            raise DataError(f"{folder}: class_embed_type {unet.config.class_embed_type!r} takes no labels")
        made = _of_pixels(folder, unet, scheduler, patch)
    if size not in (None, made.image_shape[1]):
        raise SettingError(f"{folder}: size: this model takes images of {made.image_shape[1]} pixels alone")
    return made


def _of_pixels(folder: Path, unet: Any, scheduler: Any, patch: int | None) -> PixelDenoiser:
    """A denoiser of pixels, or of patches of them."""
    if patch is None and (folder / PATCH_FILE).is_file():
        patch = json.loads((folder / PATCH_FILE).read_text(encoding="utf-8"))["patch"]
    if patch is None:
        patch = patch_of(int(unet.config.in_channels), folder)
    return PixelDenoiser(unet, scheduler) if patch == 1 else PatchedDenoiser(unet, scheduler, patch)


def _tensor(path: Path, name: str, shape: tuple[int | None, ...]) -> Tensor:
    """A tensor of a safetensors file, of these sides; None: any."""
    state = read_weights(path)
    if name not in state:
        raise DataError(f"{path}: it has no tensor {name!r}, but {', '.join(sorted(state)[:3])}")
    sides = tuple(state[name].shape)
    if len(sides) != len(shape) or any(side not in (None, found) for side, found in zip(shape, sides, strict=True)):
        wanted = ", ".join("any" if side is None else str(side) for side in shape)
        raise DataError(f"{path}: {name} has the shape {sides} in place of ({wanted})")
    check_finite({name: state[name]}, path)
    return state[name]


def _prompts_size(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        size = (file.metadata() or {}).get("size", "")
    if not size.isdecimal() or not 8 <= int(size) <= 4096:
        raise DataError(f"{path}: its size, {size!r}, is not the side of images")
    return int(size)


@torch.no_grad()
def _embedded(folder: Path, spec: PretrainedDenoiser, classes: list[str]) -> Tensor:
    """The prompts of each class and of none, as its text encoder sees them."""
    if find_spec("transformers") is None:
        raise SettingError(f"{folder}: transformers is not installed; pip install 'diffguard-ood[models]'")

    if "{}" not in spec.prompt:
        raise SettingError(f"denoiser.prompt: {spec.prompt!r} has no {{}} for the name of the class")
    if all(name.isdigit() for name in classes):
        raise SettingError("denoiser.prompt: the names of the classes are not known; give them as classes")
    tokenizer, encoder = open_text_parts(folder)
    prompts = [*(spec.prompt.replace("{}", name) for name in classes), spec.null_prompt]
    longest = tokenizer.model_max_length
    found = []
    for first in range(0, len(prompts), 64):
        tokens = tokenizer(
            prompts[first : first + 64],
            padding="max_length",
            max_length=longest,
            truncation=True,
            return_tensors="pt",
        )
        # As Stable Diffusion's own pipeline: padding is attended to, unless the encoder says otherwise.
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        found.append(encoder(tokens.input_ids, attention_mask=mask)[0].float())
    return torch.cat(found)
