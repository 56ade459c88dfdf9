"""Variants that between them do all that an engine can."""

from diffguard.settings import (
    STANDARD_PATH,
    ActivationGaussian,
    AdaptiveStop,
    AllLabels,
    ClassifierGuidance,
    DenoisingErrors,
    LabelGuidance,
    NoGuidance,
    PathGaussian,
    PathMixture,
    Variant,
)

ACTIVATIONS = ActivationGaussian(mean=(0.0,) * 16, variance=(1.0,) * 16)
STOP = AdaptiveStop(min_level=2, max_level=9, thresholds={"psnr": 70.0})
ELSEWHERE = PathGaussian(mean=(1.0,) * 6, covariance=STANDARD_PATH.covariance)
MIXTURE = PathMixture(weights=(0.25, 0.75), components=(STANDARD_PATH, ELSEWHERE))
VARIANTS = {
    "cfg-w1": Variant(stop=4, guidance=LabelGuidance(scale=1), distance="l1"),
    "cfg-w2": Variant(stop=4, guidance=LabelGuidance(scale=2), distance="l1"),
    "cfg-early-stop": Variant(stop=STOP, guidance=LabelGuidance(scale=2), distance="l1"),
    "cfg-l2": Variant(stop=4, guidance=LabelGuidance(scale=2), distance="l2"),
    "paper-cfg": Variant(stop=5, guidance=LabelGuidance(scale=10, cam_cut=0.3), distance="logits"),
    "paper-cg": Variant(stop=STOP, guidance=ClassifierGuidance(cutout_size=7), distance="l1", against="unconditional"),
    "unconditional": Variant(stop=4, guidance=NoGuidance(), distance="l1"),
    "min-over-labels": Variant(stop=4, guidance=AllLabels(), distance="l1"),
    "guided-inversion": Variant(stop=3, inversion_scale=2.0, guidance=LabelGuidance(scale=2), distance="l1"),
    "second-order": Variant(stop=4, guidance=LabelGuidance(scale=2), distance="l1", solver="dpm-solver++"),
    "published-off-by-one": Variant(stop=4, forback_skip_diff=2, guidance=NoGuidance(), distance="l1"),
    "path": Variant(stop=4, guidance=NoGuidance(), distance="path", path=STANDARD_PATH),
    "path-early-stop": Variant(stop=STOP, guidance=NoGuidance(), distance="path", path=STANDARD_PATH),
    "path-guided": Variant(stop=3, inversion_scale=2.0, guidance=NoGuidance(), distance="path", path=STANDARD_PATH),
    "label-gain": Variant(stop=4, guidance=LabelGuidance(), distance="label-gain"),
    "label-gain-drawn": Variant(
        stop=3,
        guidance=LabelGuidance(),
        distance="label-gain",
        errors=DenoisingErrors(draws=2, seed=5, weights=(1.0, 0.0, 2.0)),
    ),
    "posterior": Variant(stop=4, guidance=AllLabels(), distance="denoiser-posterior"),
    "activations": Variant(stop=1, guidance=NoGuidance(), distance="denoiser-activations", activations=ACTIVATIONS),
    "path-mixture": Variant(stop=4, guidance=NoGuidance(), distance="path", path=MIXTURE, path_components=2),
    "gain": Variant(stop=STOP, guidance=LabelGuidance(scale=2), distance="l1", against="gain"),
    "nearest-gain": Variant(stop=4, guidance=AllLabels(), distance="features-normalized", against="gain"),
    "cg-gain": Variant(
        stop=3, guidance=ClassifierGuidance(cutout_size=7), distance="logits-normalized", against="gain"
    ),
    "features-normalized": Variant(stop=4, guidance=LabelGuidance(scale=1), distance="features-normalized"),
    "logits-normalized": Variant(stop=4, guidance=LabelGuidance(scale=1), distance="logits-normalized"),
}
