"""A deployed detector of tiny models, whose scores were made the way the pipeline makes them."""

import numpy as np
import pandas as pd
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from diffguard.deploy.detector import DeployedDetector
from diffguard.deploy.info import DetectorInfo
from diffguard.detectors.baselines import fit_baseline, needs_fit, views_of
from diffguard.detectors.combination import fit_combination
from diffguard.detectors.fitting import fit_variant
from diffguard.detectors.parts import stored_view
from diffguard.engine import Request, score_batch
from diffguard.models.classifiers.base import predict_logits
from diffguard.models.classifiers.small import ConvClassifier
from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.settings import AdaptiveStop, Baseline, Combination, ImageFormat, LabelGuidance, NoGuidance, Variant
from diffguard.version import METHOD_VERSION, __version__

CPU = torch.device("cpu")
VARIANTS = {
    "guided": Variant(stop=2, guidance=LabelGuidance(scale=2, cam_cut=0.3), distance="l1"),
    "adaptive": Variant(
        stop=AdaptiveStop(min_level=1, max_level=4, thresholds={"psnr": None}, median_at=2),
        guidance=NoGuidance(),
        distance="l1",
        against="unconditional",
    ),
}
BASELINES = {
    "msp": Baseline(detector="pytorch_ood.detector:MaxSoftmax", sees="logits"),
    "complexity": Baseline(detector="diffguard.detectors:HighFrequency", sees="images"),
    "knn": Baseline(detector="pytorch_ood.detector:KNN", sees="features", arguments={"k": 3}),
    "pixel-knn": Baseline(detector="pytorch_ood.detector:KNN", sees="pixels", arguments={"k": 3}),
    "mahalanobis": Baseline(detector="pytorch_ood.detector:Mahalanobis", sees="features"),
    "kl-matching": Baseline(detector="pytorch_ood.detector:KLMatching", sees="logits"),
    "react": Baseline(detector="pytorch_ood.detector:ReAct", sees="maps"),
    "nac": Baseline(detector="pytorch_ood.detector:NACUE", sees="layers", layers=("stages.1", "stages.2")),
}
COMBINE = {
    "fused": Combination(kind="z-sum", of=("guided", "knn")),
    "gated": Combination(kind="cascade", of=("pixel-knn", "guided"), loss=0.5),
    "all": Combination(kind="maximum", of=("fused", "adaptive", "msp")),
    "gated-all": Combination(kind="cascade", of=("msp", "all"), loss=0.3),
    "best": Combination(kind="best", of=("guided", "adaptive", "complexity", "pixel-knn")),
    "weighted": Combination(kind="weighted", of=("guided", "adaptive", "complexity", "pixel-knn")),
}


def tiny_denoiser() -> PixelDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            num_class_embeds=7,
        )
    return PixelDenoiser(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2"))


def tiny_classifier() -> ConvClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return ConvClassifier(num_classes=6, width=4).eval().requires_grad_(False)


def pictures(count: int, seed: int, contrast: float = 1.0) -> torch.Tensor:
    """Images on the 256 levels that files have."""
    noise = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (((noise - 0.5) * contrast + 0.5) * 255).round() / 255


class Made:
    """Models, images of the splits, and every row's scores of them."""

    def __init__(self, classifier, denoiser, more: dict[str, Variant] | None = None) -> None:
        self.classifier, self.denoiser = classifier, denoiser
        self.train = [(pictures(40, 1), torch.arange(40) % 6)]
        self.parts = {
            ("calibration", "ind"): pictures(40, 2),
            ("validation", "ind"): pictures(20, 3),
            ("validation", "near"): pictures(20, 4, contrast=0.5),
            ("new", ""): torch.cat([pictures(12, 5), pictures(12, 6, contrast=0.4)]),
        }
        self.variants = {
            name: fit_variant(
                variant,
                denoiser,
                classifier,
                [self.parts["calibration", "ind"]],
                [images for images, _ in self.train] if variant.needs_train else [],
            )
            for name, variant in {**VARIANTS, **(more or {})}.items()
        }
        self.combined = {}
        self.scores = {part: self._own_scores(images) for part, images in self.parts.items()}
        for name, settings in COMBINE.items():
            calibration = {each: self.scores["calibration", "ind"][each] for each in settings.of}
            validation = (self.scores["validation", "ind"], {"near": self.scores["validation", "near"]})
            combined = fit_combination(settings, calibration, validation)
            self.combined[name] = combined
            for (split, _), scores in self.scores.items():
                mine = {each: scores[each] for each in settings.of}
                scores[name] = combined.score_calibration() if split == "calibration" else combined.score(mine)

    def _own_scores(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        scores = {}
        for name, variant in self.variants.items():
            [scored] = score_batch(images, self.denoiser, [Request(self.classifier, variant)])
            scores[name] = scored.score.double().numpy()
        for name, baseline in BASELINES.items():
            with torch.no_grad():
                detector = fit_baseline(name, baseline, self.classifier, self.train, CPU)
                scores[name] = detector.predict(images).double().numpy()
        return scores

    @property
    def new(self) -> torch.Tensor:
        return self.parts["new", ""]

    def table(self, split: str, detector: str) -> pd.DataFrame:
        tables = []
        for (each, role), images in self.parts.items():
            if each != split:
                continue
            scores = self.scores[each, role]
            table = pd.DataFrame({"id": [f"{role}/{split}/{i}" for i in range(len(images))]})
            table["content_hash"] = table["id"]
            table["role"], table["dataset"], table["split"] = role, role, split
            table["predicted"] = predict_logits(self.classifier, images).argmax(dim=1).numpy()
            for name, values in scores.items():
                table["score" if name == detector else f"score/{name}"] = values
            tables.append(table)
        return pd.concat(tables, ignore_index=True)

    def detector(self, name: str, alpha: float = 0.05, specs=None) -> DeployedDetector:
        info = DetectorInfo(
            diffguard=__version__,
            method_version=METHOD_VERSION,
            benchmark="tiny",
            classifier="tiny",
            seed=0,
            classes=("zero", "one", "two", "three", "four", "five"),
            image=ImageFormat(size=8, mode="L"),
            alpha=alpha,
            detector=name,
            variants=self.variants,
            baselines=BASELINES,
            combine=COMBINE,
            combined={each: combined.to_json() for each, combined in self.combined.items()},
        )
        views = {stored_view(each) for each in BASELINES.values() if needs_fit(each)}
        return DeployedDetector(
            info,
            self.classifier,
            self.denoiser,
            calibration=self.table("calibration", name),
            validation=self.table("validation", name),
            seen={sees: views_of(sees, self.classifier, self.train) for sees in views},
            example=Image.fromarray((self.new[0, 0] * 255).byte().numpy()),
            specs=specs,
            slots=8,
        )
