"""Numbers captured from the published implementation: `../shared/parity`, or DIFFGUARD_PARITY.

Every run that the folder's JSON files name is checked; nothing is skipped but the whole folder.
"""

import json
from pathlib import Path

import pytest
import torch
from published import FOLDER
from safetensors.torch import load_file
from torch import nn


def pytest_collection_modifyitems(items):
    if not FOLDER.is_dir():
        reason = f"no captured numbers: {FOLDER} is not a folder (name one in DIFFGUARD_PARITY)"
        for item in items:
            if "parity" in Path(item.fspath).parts:
                item.add_marker(pytest.mark.skip(reason=reason))


class SmoothClassifier(nn.Module):
    """The captured runs' classifier: four SiLU stages, global average pooling, one linear layer."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()

        def stage(name: str, stride: int) -> nn.Sequential:
            outputs, inputs = state[f"model.{name}.0.weight"].shape[:2]
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
            )

        self.normalize = nn.Module()
        self.normalize.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.normalize.register_buffer("std", torch.ones(1, 3, 1, 1))
        self.model = nn.Module()
        for name, stride in (("layer1", 2), ("layer2", 2), ("layer3", 2), ("layer4", 1)):
            setattr(self.model, name, stage(name, stride))
        self.num_classes, width = state["model.fc.weight"].shape
        self.model.fc = nn.Linear(width, self.num_classes)
        self.load_state_dict(state)
        self.eval().requires_grad_(False)

    @property
    def cam_layer(self) -> nn.Module:
        return self.model.layer4[-1]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        x = (images - self.normalize.mean) / self.normalize.std
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = getattr(self.model, name)(x)
        return x.mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.fc(self.features(images))


@pytest.fixture(scope="session")
def classifier() -> SmoothClassifier:
    return SmoothClassifier(load_file(FOLDER / "classifier.safetensors"))


@pytest.fixture(scope="session")
def gdm_meta() -> dict:
    return json.loads((FOLDER / "gdm_meta.json").read_text())


@pytest.fixture(scope="session")
def gdm(gdm_meta):
    from diffguard.models.conversion import from_checkpoint

    settings = gdm_meta["overrides_all"]
    return from_checkpoint(
        FOLDER / "gdm_unet.safetensors",
        image_size=settings["image_size"],
        head_channels=settings["num_head_channels"],
    )


@pytest.fixture(scope="session")
def gdm_expected() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "gdm_expected.safetensors")


@pytest.fixture(scope="session")
def ldm_meta() -> dict:
    return json.loads((FOLDER / "ldm_meta.json").read_text())


@pytest.fixture(scope="session")
def ldm(ldm_meta):
    from diffguard.models.conversion import from_checkpoint

    unet = json.loads((FOLDER / "ldm_config.json").read_text())["unet_config"]["params"]
    return from_checkpoint(
        FOLDER / "ldm_weights.safetensors", image_size=ldm_meta["config"]["image_size"], heads=unet["num_heads"]
    )


@pytest.fixture(scope="session")
def ldm_expected() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "ldm_expected.safetensors")


@pytest.fixture(scope="session")
def runner_expected() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "runner_expected.safetensors")


@pytest.fixture(scope="session")
def runner_meta() -> dict:
    return json.loads((FOLDER / "runner_meta.json").read_text())
