"""Names and shapes of the published checkpoints' tensors, written down from their layout.

Independent of `diffguard.models.conversion`: a test checks it against the captured weights, then uses it at full size.
"""

import torch


def filled(state, seed=0):
    """Random weights in these shapes, small enough to keep activations finite."""
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.1 * torch.randn(each.shape, generator=generator) for key, each in state.items()}


def unet_keys(channels, mult, resnets, attention, inputs, outputs, *, adm, context=0):
    """An OpenAI-style UNet's tensors, on the meta device.

    Args:
        attention: for each resolution, finest first, whether it has it.
        adm: guided-diffusion's (scale-shift, residual up and down) or, if not, latent diffusion's.
    """
    made, time = {}, 4 * channels

    def put(name, *shape, bias=True):
        made[f"{name}.weight"] = torch.empty(shape, device="meta")
        if bias:
            made[f"{name}.bias"] = torch.empty(shape[0], device="meta")

    def norm(name, width):
        put(name, width)

    def resnet(name, into, out):
        norm(f"{name}.in_layers.0", into)
        put(f"{name}.in_layers.2", out, into, 3, 3)
        put(f"{name}.emb_layers.1", 2 * out if adm else out, time)
        norm(f"{name}.out_layers.0", out)
        put(f"{name}.out_layers.3", out, out, 3, 3)
        if into != out:
            put(f"{name}.skip_connection", out, into, 1, 1)

    def attend(name, width):
        norm(f"{name}.norm", width)
        if adm:
            put(f"{name}.qkv", 3 * width, width, 1)
            put(f"{name}.proj_out", width, width, 1)
            return
        put(f"{name}.proj_in", width, width, 1, 1)
        put(f"{name}.proj_out", width, width, 1, 1)
        block = f"{name}.transformer_blocks.0"
        for part, seen in (("attn1", width), ("attn2", context)):
            put(f"{block}.{part}.to_q", width, width, bias=False)
            put(f"{block}.{part}.to_k", width, seen, bias=False)
            put(f"{block}.{part}.to_v", width, seen, bias=False)
            put(f"{block}.{part}.to_out.0", width, width)
        put(f"{block}.ff.net.0.proj", 8 * width, width)
        put(f"{block}.ff.net.2", width, 4 * width)
        for each in (1, 2, 3):
            norm(f"{block}.norm{each}", width)

    put("time_embed.0", time, channels)
    put("time_embed.2", time, time)
    put("input_blocks.0.0", channels * mult[0] if adm else channels, inputs, 3, 3)
    width, block, skips = channels * mult[0] if adm else channels, 1, [channels * mult[0] if adm else channels]
    for level, factor in enumerate(mult):
        for _ in range(resnets):
            resnet(f"input_blocks.{block}.0", width, channels * factor)
            width = channels * factor
            if attention[level]:
                attend(f"input_blocks.{block}.1", width)
            skips.append(width)
            block += 1
        if level + 1 < len(mult):
            if adm:
                resnet(f"input_blocks.{block}.0", width, width)
            else:
                put(f"input_blocks.{block}.0.op", width, width, 3, 3)
            skips.append(width)
            block += 1
    resnet("middle_block.0", width, width)
    attend("middle_block.1", width)
    resnet("middle_block.2", width, width)
    block = 0
    for level in reversed(range(len(mult))):
        for each in range(resnets + 1):
            resnet(f"output_blocks.{block}.0", width + skips.pop(), channels * mult[level])
            width, place = channels * mult[level], 1
            if attention[level]:
                attend(f"output_blocks.{block}.1", width)
                place = 2
            if level and each == resnets:
                if adm:
                    resnet(f"output_blocks.{block}.{place}", width, width)
                else:
                    put(f"output_blocks.{block}.{place}.conv", width, width, 3, 3)
            block += 1
    norm("out.0", width)
    put("out.2", outputs, width, 3, 3)
    return made


def vq_keys(channels, mult, resnets, latent, codes):
    """Latent diffusion's VQ autoencoder, without attention but in the middle, on the meta device."""
    made = {}

    def put(name, *shape, bias=True):
        made[f"{name}.weight"] = torch.empty(shape, device="meta")
        if bias:
            made[f"{name}.bias"] = torch.empty(shape[0], device="meta")

    def resnet(name, into, out):
        put(f"{name}.norm1", into)
        put(f"{name}.conv1", out, into, 3, 3)
        put(f"{name}.norm2", out)
        put(f"{name}.conv2", out, out, 3, 3)
        if into != out:
            put(f"{name}.nin_shortcut", out, into, 1, 1)

    def middle(name, width):
        resnet(f"{name}.block_1", width, width)
        put(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            put(f"{name}.attn_1.{part}", width, width, 1, 1)
        resnet(f"{name}.block_2", width, width)

    put("encoder.conv_in", channels, 3, 3, 3)
    width = channels
    for level, factor in enumerate(mult):
        for each in range(resnets):
            resnet(f"encoder.down.{level}.block.{each}", width, channels * factor)
            width = channels * factor
        if level + 1 < len(mult):
            put(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    middle("encoder.mid", width)
    put("encoder.norm_out", width)
    put("encoder.conv_out", latent, width, 3, 3)
    put("decoder.conv_in", width, latent, 3, 3)
    middle("decoder.mid", width)
    for level in reversed(range(len(mult))):
        for each in range(resnets + 1):
            resnet(f"decoder.up.{level}.block.{each}", width, channels * mult[level])
            width = channels * mult[level]
        if level:
            put(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    put("decoder.norm_out", width)
    put("decoder.conv_out", 3, width, 3, 3)
    put("quant_conv", latent, latent, 1, 1)
    put("post_quant_conv", latent, latent, 1, 1)
    put("quantize.embedding", codes, latent, bias=False)
    return made


def latent_keys(unet, autoencoder, labels, context):
    """The whole class-conditional latent model under its checkpoint's prefixes."""
    return {
        **{f"model.diffusion_model.{key}": each for key, each in unet.items()},
        **{f"first_stage_model.{key}": each for key, each in autoencoder.items()},
        "cond_stage_model.embedding.weight": torch.empty(labels, context, device="meta"),
    }


def published_adm():
    """256x256_diffusion_uncond.pt."""
    attention = (False, False, False, True, True, True)
    return unet_keys(256, (1, 1, 2, 2, 4, 4), 2, attention, 3, 6, adm=True)


def published_ldm():
    """cin256-v2/model.ckpt."""
    unet = unet_keys(192, (1, 2, 3, 5), 2, (False, True, True, True), 3, 3, adm=False, context=512)
    return latent_keys(unet, vq_keys(128, (1, 2, 4), 2, 3, 8192), 1001, 512)
