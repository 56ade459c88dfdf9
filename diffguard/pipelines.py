"""Denoisers in folders of Diffusers' layout and on the Hugging Face hub: saved, loaded, fitted to one's classes."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffguard.denoisers import (
    EMBEDDER_FILE,
    LABELS_FILE,
    PROMPTS_FILE,
    LatentDenoiser,
    PixelDenoiser,
    RelabeledDenoiser,
    TextDenoiser,
    TransformerDenoiser,
    label_embedder,
)
from diffguard.errors import DataError, DiffGuardError, ServiceError, SettingError
from diffguard.specs import ObjectDenoiser, PretrainedDenoiser
from diffguard.utils.importing import import_object
from diffguard.utils.text import first_line

_CONFIG = "scheduler_config.json"
_OPTIONS = {"local_files_only": True, "low_cpu_mem_usage": False}
"""Diffusers' default for weights, low_cpu_mem_usage, needs accelerate."""


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


def load_denoiser(folder: str | Path) -> Any:
    """Load a denoiser from a folder in Diffusers' layout, or one that `save_denoiser` wrote.

    Its parts tell its kind: a UNet alone works on pixels (its files may lie in the folder itself), with
    vqvae/ and class_embedder/ it is a latent model; transformer/ and vae/ make a diffusion transformer. A
    text-conditioned model needs to know its prompts: see `open_denoiser`.

    Raises:
        DataError: the folder or a part of it is missing, or is not such a model.
    """
    return _load(Path(folder), None)


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
        where, opened = spec.path, _load(_local(spec.path), (spec, list(classes)))
    if spec.labels is not None:
        return _relabeled(opened, spec.labels, classes, where)
    if opened.num_labels and opened.num_labels != len(classes):
        raise SettingError(
            f"denoiser {where}: it knows {opened.num_labels} labels, the benchmark has {len(classes)} classes; "
            "give labels: the denoiser's label of each class, in order"
        )
    return opened


def _relabeled(denoiser: Any, labels: Sequence[int], classes: Sequence[str], where: str) -> RelabeledDenoiser:
    if not denoiser.num_labels:
        raise SettingError(f"denoiser {where}: labels are given, and it takes none")
    if len(labels) != len(classes):
        raise SettingError(f"denoiser {where}: labels: {len(labels)} are given for {len(classes)} classes")
    if wrong := [each for each in labels if not 0 <= each < denoiser.num_labels]:
        raise SettingError(f"denoiser {where}: labels: {wrong[0]} is not within 0..{denoiser.num_labels - 1}")
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


def _local(path: str) -> Path:
    """A model's folder; of a hub id, where the hub's cache has it, downloaded if need be."""
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise DataError(f"{path}: no such folder of a denoiser")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(path, safety_checker=None))
    except Exception as error:  # whatever a download raises: of httpx, of the hub
        raise ServiceError(
            f"denoiser {path}: the Hugging Face hub cannot be reached for it ({first_line(error)}); download it "
            "where there is a network, and give its folder as path"
        ) from None


def _load(folder: Path, prompted: tuple[PretrainedDenoiser, list[str]] | None) -> Any:
    from diffusers import DDPMScheduler

    # Old pixel models have their files in the folder itself.
    places = [folder / "scheduler", folder]
    place = next((each for each in places if (each / _CONFIG).is_file()), None)
    if place is None:
        raise DataError(f"{folder}: no denoiser here (scheduler/{_CONFIG} is missing); train one, or name its folder")
    try:
        scheduler = DDPMScheduler.from_pretrained(place, local_files_only=True)
        loaded = _load_parts(folder, scheduler, prompted)
        if (folder / LABELS_FILE).is_file():
            return RelabeledDenoiser(loaded, json.loads((folder / LABELS_FILE).read_text(encoding="utf-8")))
        return loaded
    except DiffGuardError as error:
        raise type(error)(f"{folder}: {error}" if str(folder) not in str(error) else str(error)) from None
    except Exception as error:  # whatever Diffusers raises for a folder that is none of its own
        raise DataError(f"{folder}: the denoiser cannot be loaded: {first_line(error)}") from error


def _load_parts(folder: Path, scheduler: Any, prompted: tuple[PretrainedDenoiser, list[str]] | None) -> Any:
    from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel, VQModel
    from safetensors import safe_open
    from safetensors.torch import load_file

    size = prompted[0].size if prompted is not None else None
    if (folder / "transformer").is_dir():
        transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer", **_OPTIONS)
        vae = AutoencoderKL.from_pretrained(folder / "vae", **_OPTIONS)
        made: Any = TransformerDenoiser(transformer, vae, scheduler)
    elif (folder / "vqvae").is_dir():
        if not (folder / EMBEDDER_FILE).is_file():
            raise DataError(f"{folder}: a latent model without {EMBEDDER_FILE}, the embeddings of its labels")
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", **_OPTIONS)
        vqvae = VQModel.from_pretrained(folder / "vqvae", **_OPTIONS)
        made = LatentDenoiser(unet, vqvae, label_embedder(load_file(folder / EMBEDDER_FILE)["weight"]), scheduler)
    elif (folder / "vae").is_dir():
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", **_OPTIONS)
        if unet.config.addition_embed_type is not None:
            raise DataError(
                f"{folder}: it asks for more than a prompt ({unet.config.addition_embed_type}), as SDXL does"
            )
        vae = AutoencoderKL.from_pretrained(folder / "vae", **_OPTIONS)
        if (folder / PROMPTS_FILE).is_file():
            with safe_open(folder / PROMPTS_FILE, framework="pt") as file:
                embeddings, side = file.get_tensor("embeddings"), int(file.metadata()["size"])
            return TextDenoiser(unet, vae, embeddings, scheduler, side)
        if prompted is None:
            raise DataError(f"{folder}: a text-conditioned model has to be opened with the names of classes")
        return TextDenoiser(unet, vae, _embedded(folder, *prompted), scheduler, size)
    else:
        unet = UNet2DModel.from_pretrained(folder / "unet" if (folder / "unet").is_dir() else folder, **_OPTIONS)
        if unet.config.class_embed_type is not None:
            raise DataError(f"{folder}: class_embed_type {unet.config.class_embed_type!r} takes no labels")
        made = PixelDenoiser(unet, scheduler)
    if size not in (None, made.image_shape[1]):
        raise SettingError(f"{folder}: size: this model takes images of {made.image_shape[1]} pixels alone")
    return made


@torch.no_grad()
def _embedded(folder: Path, spec: PretrainedDenoiser, classes: list[str]) -> Tensor:
    """The prompts of each class and of none, as its text encoder sees them."""
    try:
        import transformers
    except ImportError:
        raise SettingError(f"{folder}: transformers is not installed; pip install 'diffguard[models]'") from None

    if "{}" not in spec.prompt:
        raise SettingError(f"denoiser.prompt: {spec.prompt!r} has no {{}} for the name of the class")
    if all(name.isdigit() for name in classes):
        raise SettingError("denoiser.prompt: the names of the classes are not known; give them as classes")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    made = {}
    for part in ("tokenizer", "text_encoder"):
        made[part] = getattr(transformers, index[part][1]).from_pretrained(folder / part, local_files_only=True)
    tokenizer, encoder = made["tokenizer"], made["text_encoder"].eval()
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
