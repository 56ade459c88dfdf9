"""Diffusers' pipelines of each kind at a tiny size with random weights, saved as their own code saves them."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from safetensors.torch import save_file

SIDE = 16
"""Of the images, in pixels; that of latents is half of it."""

BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def seeded(make, *arguments, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*arguments, **options)


def unet(labels: int | None, channels: int = 3) -> UNet2DModel:
    return seeded(
        UNet2DModel,
        sample_size=SIDE,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        num_class_embeds=labels,
        **BLOCKS,
    )


def autoencoder() -> AutoencoderKL:
    return seeded(
        AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=SIDE,
        scaling_factor=0.18215,
        **BLOCKS,
    )


def conditional_unet(width: int, channels: int) -> UNet2DConditionModel:
    return seeded(
        UNet2DConditionModel,
        sample_size=SIDE // 2,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
        **BLOCKS,
    )


def save_unconditional(folder: Path) -> None:
    """As google/ddpm-cifar10-32 has it: the files in the folder itself."""
    DDPMPipeline(unet(None), DDPMScheduler()).save_pretrained(folder / "pipeline")
    for part in ("unet", "scheduler"):
        for file in (folder / "pipeline" / part).iterdir():
            file.rename(folder / file.name)


def save_conditional(folder: Path, labels: int = 4, prediction: str = "epsilon") -> None:
    """Class embeddings of so many labels, and one of none."""
    pipeline = DDPMPipeline(unet(labels + 1), DDPMScheduler(prediction_type=prediction))
    pipeline.save_pretrained(folder)


def save_dit(folder: Path, labels: int = 4) -> None:
    transformer = seeded(
        DiTTransformer2DModel,
        sample_size=SIDE // 2,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,  # with the variance
        num_layers=2,
        patch_size=2,
        num_embeds_ada_norm=labels,
    )
    # Zero at the start, its blocks would not see the label.
    for block in transformer.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)
    id2label = {number: f"label {number}" for number in range(labels)}
    DiTPipeline(transformer, autoencoder(), DDIMScheduler(), id2label=id2label).save_pretrained(folder)


def save_latent(folder: Path, labels: int = 4) -> None:
    """The layout that `diffguard convert` gives latent diffusion's class-conditional checkpoint."""
    conditional_unet(8, 3).save_pretrained(folder / "unet")
    seeded(
        VQModel,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=32,
        **BLOCKS,
    ).save_pretrained(folder / "vqvae")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    (folder / "class_embedder").mkdir()
    weight = torch.randn(labels + 1, 8, generator=torch.Generator().manual_seed(0))
    save_file({"weight": weight}, folder / "class_embedder" / "model.safetensors")


def save_stable_diffusion(folder: Path, prediction: str = "epsilon") -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{each}</w>" for each in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=40)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40, "vocab_size": len(words)}
    config = CLIPTextConfig(hidden_size=8, intermediate_size=16, **shape, **ends)
    StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=seeded(CLIPTextModel, config),
        tokenizer=tokenizer,
        unet=conditional_unet(8, 4),
        scheduler=PNDMScheduler(beta_schedule="scaled_linear", prediction_type=prediction, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def timm_weights(path, name, num_classes=4, **arguments):
    """The weights of a network of timm, at random."""
    import timm

    torch.manual_seed(0)
    save_file(timm.create_model(name, num_classes=num_classes, **arguments).state_dict(), path)
