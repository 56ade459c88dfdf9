"""Conversion of published checkpoints to Diffusers models, by renaming weights; no published network code is run.

Two layouts are known: guided-diffusion's ADM UNet (``256x256_diffusion_uncond.pt``) and latent diffusion's
class-conditional model (``cin256-v2/model.ckpt``: UNet, VQ autoencoder, class embedder). The architecture is derived
from the shapes of the weights; what they do not determine is an argument, by default as published.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffguard.errors import DataError, SettingError
from diffguard.models.denoisers.latent import LatentDenoiser, label_embedder
from diffguard.models.denoisers.loading import save_denoiser
from diffguard.models.denoisers.noise_schedule import make_scheduler
from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.models.weights import check_finite, fitting, give_weights, read_weights

State = Mapping[str, Tensor]

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_AUTOENCODER = {
    "mid.block_1.": "mid_block.resnets.0.",
    "mid.block_2.": "mid_block.resnets.1.",
    "mid.attn_1.norm.": "mid_block.attentions.0.group_norm.",
    "mid.attn_1.q.": "mid_block.attentions.0.to_q.",
    "mid.attn_1.k.": "mid_block.attentions.0.to_k.",
    "mid.attn_1.v.": "mid_block.attentions.0.to_v.",
    "mid.attn_1.proj_out.": "mid_block.attentions.0.to_out.0.",
    "norm_out.": "conv_norm_out.",
    "nin_shortcut.": "conv_shortcut.",
    ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.",
}
_UNET_PREFIX, _VQ_PREFIX, _LABEL_KEY = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.embedding.weight",
)
_FIRST = "input_blocks.0.0.weight"
_UNET = "the UNet, by Diffusers' names"


@dataclass(frozen=True)
class Training:
    """The noise schedule of a checkpoint's training.

    Attributes:
        schedule: of the betas: linear, cosine, or scaled-linear (linear in their square roots); None: the published
            one of the layout.
        steps: number of timesteps.
        beta_start, beta_end: first and last beta of a linear schedule of 1000 steps, in (0, 1); for fewer steps the
            betas are larger in proportion, as in guided-diffusion. None: the published ones.

    Raises:
        SettingError: the schedule is unknown, or a number is out of range.
    """

    schedule: str | None = None
    steps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None

    def __post_init__(self) -> None:
        if self.schedule not in (None, *SCHEDULES):
            raise SettingError(f"schedule: {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.steps < 2:
            raise SettingError(f"steps: {self.steps} is not at least 2")
        for option in ("beta_start", "beta_end"):
            value = getattr(self, option)
            if value is not None and not 0 < value < 1:
                raise SettingError(f"{option}: {value:g} is not between 0 and 1")

    def pixel_scheduler(self, learned_variance: bool) -> Any:
        """Make the scheduler of guided-diffusion's model (arXiv 2105.05233)."""
        return self._scheduler("linear", 1e-4, 0.02, 1000 / self.steps, learned_variance)

    def latent_scheduler(self) -> Any:
        """Make the scheduler of latent diffusion's model (arXiv 2112.10752)."""
        return self._scheduler("scaled-linear", 0.0015, 0.0195, 1.0, False)

    def _scheduler(self, schedule: str, start: float, end: float, scale: float, learned_variance: bool) -> Any:
        start, end = self.beta_start or start, self.beta_end or end
        name = SCHEDULES[self.schedule or schedule]
        scale = scale if name == "linear" else 1.0
        return make_scheduler(name, start * scale, end * scale, self.steps, learned_variance=learned_variance)


SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2", "scaled-linear": "scaled_linear"}
"""Schedules of the betas, with their names in Diffusers."""


def from_checkpoint(
    path: str | Path,
    *,
    image_size: int = 256,
    head_channels: int = 64,
    heads: int = 1,
    training: "Training | None" = None,
) -> PixelDenoiser | LatentDenoiser:
    """Load the denoiser in a published checkpoint.

    Args:
        image_size: side of the images, in pixels.
        head_channels: channels of each attention head (pixel model; guided-diffusion's num_head_channels).
        heads: number of attention heads (latent model; num_heads of its configuration).
        training: the noise schedule of its training, which a checkpoint does not hold; None: the published one.

    Raises:
        SettingError: a number is less than 1.
        DataError: the file cannot be read, has neither layout, or its keys are missing or have other shapes.
    """
    _check_positive(image_size=image_size, head_channels=head_channels, heads=heads)
    state = fitting(read_weights(path), lambda names: int(_FIRST in names or _UNET_PREFIX + _FIRST in names))
    if _FIRST in state:
        return pixel_denoiser(state, str(path), image_size, head_channels, training)
    if _UNET_PREFIX + _FIRST in state:
        return latent_denoiser(state, str(path), image_size, heads, training)
    examples = ", ".join(sorted(state)[:3])
    raise DataError(
        f"{path}: neither guided-diffusion's layout (input_blocks.0.0.weight is missing) nor latent "
        f"diffusion's ({_UNET_PREFIX}input_blocks.0.0.weight is missing); it has {examples}, ..."
    )


def _check_positive(**options: int) -> None:
    for option, value in options.items():
        if value < 1:
            raise SettingError(f"{option}: {value} is not at least 1")


def convert(path: str | Path, folder: str | Path, **options: Any) -> PixelDenoiser | LatentDenoiser:
    """Convert a published checkpoint to a folder in Diffusers' layout; see `from_checkpoint`.

    Raises:
        DataError: see `from_checkpoint`; or the folder exists already.
    """
    if Path(folder).exists():
        raise DataError(f"{folder}: exists already; name a new folder")
    denoiser = from_checkpoint(path, **options)
    save_denoiser(denoiser, folder)
    return denoiser


def pixel_denoiser(
    state: State, source: str, image_size: int, head_channels: int, training: "Training | None" = None
) -> PixelDenoiser:
    """Convert the ADM UNet of guided-diffusion (arXiv 2105.05233): scale-shift norm, residual up- and downsampling."""
    from diffusers import UNet2DModel

    shape = _shape_of_unet(state, source)
    network = _empty(lambda: UNet2DModel(**pixel_config(shape, image_size, head_channels)))
    give_weights(network, unet_weights(state, shape, head_channels), source, _UNET)
    return PixelDenoiser(network, (training or Training()).pixel_scheduler(shape.out_channels > shape.in_channels))


def latent_denoiser(
    state: State, source: str, image_size: int, heads: int, training: "Training | None" = None
) -> LatentDenoiser:
    """Convert latent diffusion's class-conditional model with VQ autoencoder (arXiv 2112.10752)."""
    from diffusers import UNet2DConditionModel, VQModel

    unet_state = _under(state, _UNET_PREFIX)
    vq_state = _under(state, _VQ_PREFIX)
    vq_state = {key: weight for key, weight in vq_state.items() if not key.startswith("loss.")}
    if _LABEL_KEY not in state:
        raise DataError(f"{source}: {_LABEL_KEY} is missing; a class-conditional model has it")
    shape = _shape_of_unet(unet_state, source)
    vq = vq_config(vq_state, source, image_size)
    latent_size = image_size // 2 ** (len(vq["block_out_channels"]) - 1)
    unet = _empty(lambda: UNet2DConditionModel(**latent_config(shape, latent_size, heads)))
    give_weights(unet, unet_weights(unet_state, shape, None), source, _UNET)
    autoencoder = _empty(lambda: VQModel(**vq))
    give_weights(autoencoder, vq_weights(vq_state), source, f"the autoencoder ({_VQ_PREFIX}*, by Diffusers' names)")
    check_finite({_LABEL_KEY: state[_LABEL_KEY]}, source)
    embedder = label_embedder(state[_LABEL_KEY].float())
    return LatentDenoiser(unet, autoencoder, embedder, (training or Training()).latent_scheduler())


def pixel_config(shape: "UNetShape", image_size: int, head_channels: int) -> dict[str, Any]:
    """Return the arguments of the Diffusers ``UNet2DModel`` that is equivalent to guided-diffusion's UNet."""
    return dict(
        sample_size=image_size,
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        layers_per_block=shape.resnets,
        block_out_channels=shape.channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in shape.attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(shape.attention)),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=head_channels,
        # Otherwise UNet2DModel omits the norm before the middle attention.
        attn_norm_num_groups=32,
        norm_num_groups=32,
        norm_eps=1e-5,
        freq_shift=0,
        flip_sin_to_cos=True,
    )


def latent_config(shape: "UNetShape", latent_size: int, heads: int) -> dict[str, Any]:
    """Return the arguments of the Diffusers ``UNet2DConditionModel`` that is equivalent to latent diffusion's UNet."""
    return dict(
        sample_size=latent_size,
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        layers_per_block=shape.resnets,
        block_out_channels=shape.channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in shape.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(shape.attention)),
        cross_attention_dim=shape.context,
        # In spite of its name, the number of heads.
        attention_head_dim=heads,
        norm_num_groups=32,
        norm_eps=1e-5,
        freq_shift=0,
        flip_sin_to_cos=True,
    )


@dataclass(frozen=True)
class UNetShape:
    """The architecture of an OpenAI-style UNet.

    Attributes:
        in_channels, out_channels: of the network's input and output.
        resnets: number of residual blocks per resolution.
        channels: of each resolution, finest first.
        attention: whether each resolution has attention.
        context: width of the label embedding; 0 if there is none.
    """

    in_channels: int
    out_channels: int
    resnets: int
    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    context: int = 0

    @classmethod
    def of(cls, state: State) -> "UNetShape":
        """Derive the architecture from the weights.

        Raises:
            KeyError: a tensor is missing. ValueError: there are not as many output blocks as input blocks.
        """
        blocks = _count(state, "input_blocks")
        upsampling = [block for block in range(_count(state, "output_blocks")) if _upsampler(state, block)]
        resnets = upsampling[0] if upsampling else blocks - 1
        stride, levels = resnets + 1, len(upsampling) + 1
        if blocks != stride * levels or _count(state, "output_blocks") != blocks:
            raise ValueError("input_blocks and output_blocks do not pair")
        first = [1 + stride * level for level in range(levels)]
        context = state.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
        return cls(
            in_channels=state["input_blocks.0.0.weight"].shape[1],
            out_channels=state["out.2.weight"].shape[0],
            resnets=resnets,
            channels=tuple(state[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in first),
            attention=tuple(f"input_blocks.{i}.1.norm.weight" in state for i in first),
            context=0 if context is None else context.shape[1],
        )


PUBLISHED_PIXEL = UNetShape(3, 6, 2, (256, 256, 512, 512, 1024, 1024), (False, False, False, True, True, True))
"""The UNet of 256x256_diffusion_uncond.pt."""

PUBLISHED_LATENT = UNetShape(3, 3, 2, (192, 384, 576, 960), (False, True, True, True), 512)
"""The UNet of cin256-v2/model.ckpt."""


def _upsampler(state: State, block: int) -> int | None:
    """The index of the upsampler in an output block; None if the block has none."""
    for index in (1, 2):
        prefix = f"output_blocks.{block}.{index}."
        if prefix + "conv.weight" in state or prefix + "in_layers.2.weight" in state:
            return index
    return None


def _module_names(state: State, shape: UNetShape) -> dict[str, str]:
    """The names of an OpenAI-style UNet's modules, with those in Diffusers."""
    names = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    names |= {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    names |= {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    names["middle_block.1"] = "mid_block.attentions.0"
    stride = shape.resnets + 1
    for block in range(1, stride * len(shape.channels)):
        level, index = divmod(block - 1, stride)
        if index == shape.resnets:
            names[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            names[f"input_blocks.{block}.0"] = f"down_blocks.{level}.downsamplers.0"
        else:
            names[f"input_blocks.{block}.0"] = f"down_blocks.{level}.resnets.{index}"
            names[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{index}"
    for block in range(stride * len(shape.channels)):
        level, index = divmod(block, stride)
        names[f"output_blocks.{block}.0"] = f"up_blocks.{level}.resnets.{index}"
        names[f"output_blocks.{block}.1"] = f"up_blocks.{level}.attentions.{index}"
        upsampler = _upsampler(state, block)
        if upsampler is not None:
            names[f"output_blocks.{block}.{upsampler}"] = f"up_blocks.{level}.upsamplers.0"
    return names


def unet_weights(state: State, shape: UNetShape, head_channels: int | None) -> dict[str, Tensor]:
    """Rename the weights of an OpenAI-style UNet to Diffusers' names.

    Args:
        head_channels: channels of each attention head, if its attention is guided-diffusion's (one qkv layer); None: a
            latent model's, of transformer blocks.
    """
    names, renamed = _module_names(state, shape), dict[str, Tensor]()
    for key, weight in state.items():
        prefix = _longest_prefix(key, names)
        if prefix is None:
            renamed[key] = weight
            continue
        target, rest = names[prefix], key[len(prefix) + 1 :]
        if rest.startswith("qkv.") and head_channels is not None:
            for name, part in zip(("to_q", "to_k", "to_v"), _split_heads(weight, head_channels), strict=True):
                renamed[f"{target}.{name}.{rest[4:]}"] = part
        elif head_channels is not None and ".attentions." in target:
            rest = rest.replace("norm.", "group_norm.").replace("proj_out.", "to_out.0.")
            renamed[f"{target}.{rest}"] = weight[..., 0] if weight.ndim == 3 else weight
        else:
            module, _, kind = rest.rpartition(".")
            renamed[f"{target}.{_RESNET.get(module, module)}.{kind}".replace("..", ".")] = weight
    return renamed


def _split_heads(weight: Tensor, head_channels: int) -> list[Tensor]:
    """Split guided-diffusion's qkv, in which the three of each head are adjacent, into query, key and value."""
    rows = weight[..., 0] if weight.ndim == 3 else weight
    heads = rows.shape[0] // (3 * head_channels)
    if heads * 3 * head_channels != rows.shape[0]:
        raise DataError(f"head_channels: {head_channels} does not divide the {rows.shape[0] // 3} attention channels")
    by_head = rows.reshape(heads, 3, head_channels, *rows.shape[1:])
    return [by_head[:, part].reshape(heads * head_channels, *rows.shape[1:]) for part in range(3)]


def vq_config(state: State, source: str, image_size: int) -> dict[str, Any]:
    """Return the arguments of the Diffusers ``VQModel`` with these weights.

    Raises:
        DataError: a tensor is missing.
    """
    try:
        levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))
        layers = 1 + max(int(key.split(".")[4]) for key in state if key.startswith("encoder.down.0.block."))
        return dict(
            sample_size=image_size,
            in_channels=state["encoder.conv_in.weight"].shape[1],
            out_channels=state["decoder.conv_out.weight"].shape[0],
            block_out_channels=tuple(
                state[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)
            ),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=layers,
            latent_channels=state["quant_conv.weight"].shape[0],
            num_vq_embeddings=state["quantize.embedding.weight"].shape[0],
            vq_embed_dim=state["quantize.embedding.weight"].shape[1],
            norm_num_groups=32,
        )
    except (KeyError, ValueError) as error:
        raise DataError(f"{source}: the VQ autoencoder is not whole ({_VQ_PREFIX}: {error})") from None


def vq_weights(state: State) -> dict[str, Tensor]:
    """Rename the weights of latent diffusion's VQ autoencoder to Diffusers' names."""
    levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))
    renamed = {}
    for key, weight in state.items():
        name = re.sub(r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", key)
        name = re.sub(r"encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
        # Its decoder counts resolutions from the finest, Diffusers' from the coarsest.
        name = re.sub(
            r"decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", name
        ).replace(".block.", ".resnets.")
        for old, new in _AUTOENCODER.items():
            name = name.replace(old, new)
        renamed[name] = weight[..., 0, 0] if "attentions" in name and weight.ndim == 4 else weight
    return renamed


def _shape_of_unet(state: State, source: str) -> UNetShape:
    try:
        return UNetShape.of(state)
    except (KeyError, IndexError) as error:
        raise DataError(f"{source}: the UNet is not whole ({error} is missing)") from None
    except ValueError as error:
        raise DataError(f"{source}: the UNet is not of a known layout ({error})") from None


def _empty(make: Any) -> nn.Module:
    """Build a network without memory for its weights, which `give_weights` assigns."""
    with torch.device("meta"):
        network: nn.Module = make()
    return network


def _under(state: State, prefix: str) -> dict[str, Tensor]:
    """The weights whose names have a prefix, without it."""
    return {key[len(prefix) :]: weight for key, weight in state.items() if key.startswith(prefix)}


def _count(state: State, name: str) -> int:
    """The number of blocks in a list of modules."""
    return 1 + max((int(key.split(".")[1]) for key in state if key.startswith(name + ".")), default=-1)


def _longest_prefix(key: str, names: Mapping[str, str]) -> str | None:
    parts = key.split(".")
    for size in (4, 3, 2):
        prefix = ".".join(parts[:size])
        if prefix in names:
            return prefix
    return None
