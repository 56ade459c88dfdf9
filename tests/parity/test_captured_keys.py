"""The list of published names, used at full size elsewhere, is the captured weights' own."""

import json

from published import FOLDER
from published_keys import latent_keys, unet_keys, vq_keys
from safetensors.torch import load_file


def shapes(state):
    return {key: tuple(each.shape) for key, each in state.items()}


def test_pixel_model(gdm_meta):
    settings = gdm_meta["overrides_all"]
    mult = tuple(int(each) for each in settings["channel_mult"].split(","))
    at = {int(each) for each in settings["attention_resolutions"].split(",")}
    attention = tuple(settings["image_size"] // 2**level in at for level in range(len(mult)))
    made = unet_keys(settings["num_channels"], mult, 2, attention, 3, 6, adm=True)
    assert shapes(made) == shapes(load_file(FOLDER / "gdm_unet.safetensors"))


def test_latent_model():
    config = json.loads((FOLDER / "ldm_config.json").read_text())
    unet, first = config["unet_config"]["params"], config["first_stage_config"]["params"]
    mult, autoencoder = unet["channel_mult"], first["ddconfig"]
    attention = tuple(2**level in unet["attention_resolutions"] for level in range(len(mult)))
    made = latent_keys(
        unet_keys(
            unet["model_channels"],
            mult,
            unet["num_res_blocks"],
            attention,
            unet["in_channels"],
            unet["out_channels"],
            adm=False,
            context=unet["context_dim"],
        ),
        vq_keys(
            autoencoder["ch"],
            autoencoder["ch_mult"],
            autoencoder["num_res_blocks"],
            autoencoder["z_channels"],
            first["n_embed"],
        ),
        config["cond_stage_config"]["params"]["n_classes"],
        unet["context_dim"],
    )
    assert shapes(made) == shapes(load_file(FOLDER / "ldm_weights.safetensors"))
