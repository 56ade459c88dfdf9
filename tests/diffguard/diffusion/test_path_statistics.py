"""The statistics of a path by hand, the Gaussian of them, and the detector that scores them."""

import numpy as np
import pytest
import torch
from pytorch_ood.api import RequiresFittingException
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture
from sklearn.preprocessing import StandardScaler

from diffguard.detectors.diffguard import DiffGuard, verdicts
from diffguard.detectors.fitting import fit_variant
from diffguard.diffusion.early_stop import psnr
from diffguard.diffusion.path_statistics import (
    MIXTURE_STARTS,
    SHRINKAGE,
    fit_path,
    path_gaps,
    path_score,
    path_terms,
)
from diffguard.diffusion.reference import invert
from diffguard.diffusion.schedules import trailing_schedule
from diffguard.errors import SettingError
from diffguard.settings import (
    STANDARD_PATH,
    AdaptiveStop,
    LabelGuidance,
    NoGuidance,
    PathGaussian,
    PathMixture,
    Variant,
    parse_settings,
)

VARIANT = Variant(stop=4, guidance=NoGuidance(), distance="path")
MIXED = VARIANT.model_copy(update={"path_components": 2})
STOP = AdaptiveStop(min_level=2, max_level=7, thresholds={"psnr": None}, median_at=4)
ONE = STANDARD_PATH.model_dump()


class Noted:
    """A denoiser that keeps the noise that it predicted."""

    def __init__(self, denoiser):
        self._denoiser, self.eps_seen, self.timesteps = denoiser, [], []

    def __getattr__(self, name):
        return getattr(self._denoiser, name)

    def eps(self, x, timestep, label):
        self.eps_seen.append(self._denoiser.eps(x, timestep, label))
        self.timesteps.append(int(timestep[0]))
        return self.eps_seen[-1]


def test_the_statistics_are_the_sums_over_the_steps(images, denoiser):
    noted = Noted(denoiser)
    schedule = trailing_schedule(denoiser.alphas_cumprod, 10)
    early, late = invert(noted, denoiser.encode(images), schedule, [2, 5], clip=True)
    eps = torch.stack(noted.eps_seen).double().numpy()  # [5, B, ...]
    time = np.array(noted.timesteps) / 1000
    assert noted.timesteps == [49, 99, 199, 299, 399]
    slope = np.diff(eps, axis=0) / np.diff(time)[:, None, None, None, None]
    for end, moves in ((early, 2), (late, 5)):
        for p in (1, 2, 3):
            strength = (eps[:moves] ** p).mean(axis=(2, 3, 4)).sum(axis=0)
            change = (slope[: moves - 1] ** p).mean(axis=(2, 3, 4)).sum(axis=0)
            assert np.allclose(end.path[:, p - 1], strength, rtol=1e-4, atol=1e-6)
            assert np.allclose(end.path[:, p + 2], change, rtol=1e-4, atol=1e-5)


def test_each_image_has_the_statistics_of_its_own_number_of_steps(images, denoiser):
    schedule, latents = trailing_schedule(denoiser.alphas_cumprod, 10), denoiser.encode(images)
    levels = list(range(2, 8))
    ends = dict(zip(levels, invert(denoiser, latents, schedule, levels, clip=True), strict=True))
    threshold = float(psnr(ends[4].latents, latents).median())
    stop = AdaptiveStop(min_level=2, max_level=7, thresholds={"psnr": threshold})
    [stopped] = invert(denoiser, latents, schedule, [stop], clip=True)
    assert len(set(stopped.level.tolist())) > 1
    for row, level in enumerate(stopped.level.tolist()):
        assert torch.allclose(stopped.path[row], ends[level].path[row], rtol=1e-4, atol=1e-5)


def test_differences_do_not_depend_on_how_finely_the_same_path_is_cut():
    # Noise that grows evenly in time: its slope is the same at any stride, its sum of squares times the stride.
    slopes = {}
    for strides in (10, 40):
        timestep = torch.arange(strides) * (1000 // strides)
        eps = (3.0 * timestep / 1000)[:, None, None].expand(-1, 2, 5)
        gaps = path_gaps(timestep, 1000)
        terms = [path_terms(eps[[k]], eps[[max(k - 1, 0)]], gaps[[k]])[0] for k in range(strides)]
        assert terms[0][3:].tolist() == [0.0, 0.0, 0.0]
        slopes[strides] = torch.stack(terms[1:])[:, 3:]
    assert torch.allclose(slopes[10].mean(dim=0), torch.tensor([3.0, 9.0, 27.0], dtype=torch.float64), rtol=1e-4)
    assert torch.allclose(slopes[40].mean(dim=0), slopes[10].mean(dim=0), rtol=1e-4)


def test_magnitudes_do_not_depend_on_the_size_of_the_latents():
    eps = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    gap = torch.tensor([0.1, 0.2], dtype=torch.float64)
    small, large = (path_terms(each, each.flip(0), gap) for each in (eps, eps.repeat(1, 1, 3, 3)))
    assert torch.allclose(small, large, rtol=1e-4)


def test_the_score_is_the_negative_log_likelihood_up_to_a_constant():
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64) * 3.0 ** torch.arange(6)
    values = torch.randn(200, 6, generator=generator, dtype=torch.float64) @ mixing + 5
    gaussian = fit_path(values)
    covariance = np.cov(values.T.numpy())
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.diag(np.diag(covariance))
    density = multivariate_normal(values.mean(dim=0).numpy(), shrunk)
    constant = density.logpdf(density.mean)
    assert np.allclose(path_score(gaussian, values), constant - density.logpdf(values.numpy()), rtol=1e-6)
    assert float(path_score(gaussian, torch.tensor([gaussian.mean], dtype=torch.float64))) == 0


def clusters(count, seed):
    """Statistics of two kinds of images, of scales that differ as those of powers do; float64 [count, 6]."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.arange(count) % 3 == 0
    values = torch.randn(count, 6, generator=generator, dtype=torch.float64) + 8 * kind[:, None]
    return values * 3.0 ** torch.arange(-2, 4)


def test_a_mixture_scores_as_scikit_learns():
    train, new = clusters(150, seed=4), clusters(60, seed=5)
    new[::4] *= 20  # far from all of them
    scaler = StandardScaler().fit(train.numpy())
    settings = {"reg_covar": SHRINKAGE, "n_init": MIXTURE_STARTS, "tol": 1e-5, "max_iter": 1000, "random_state": 0}
    expected = GaussianMixture(3, **settings).fit(scaler.transform(train[train[:, 0].argsort()].numpy()))
    mixture = fit_path(train, 3)
    assert isinstance(mixture, PathMixture)
    assert sum(mixture.weights) == pytest.approx(1)
    # The density of a statistic in its own units is that of the standardized one over its scale.
    log_density = expected.score_samples(scaler.transform(new.numpy())) - np.log(scaler.scale_).sum()
    assert np.allclose(path_score(mixture, new), -log_density, rtol=1e-6)
    assert fit_path(train, 3) == mixture


def test_a_mixture_does_not_depend_on_the_order_of_images():
    """Nor on rounding, where several ends are about as likely: as many components as these few images bear."""
    generator = torch.Generator().manual_seed(10)
    values, new = torch.randn(2, 63, 6, generator=generator, dtype=torch.float64)
    scores = path_score(fit_path(values, 9), new)
    for _ in range(3):
        order = torch.randperm(63, generator=generator)
        rounded = values[order] + 1e-7 * torch.randn(63, 6, generator=generator, dtype=torch.float64)
        assert np.allclose(path_score(fit_path(rounded, 9), new), scores, rtol=1e-2)


def test_a_mixture_is_exactly_the_sum_of_its_weighted_gaussians():
    mixture, new = fit_path(clusters(300, seed=4), 2), clusters(60, seed=5)
    densities = [
        weight * multivariate_normal(gaussian.mean, gaussian.covariance).pdf(new.numpy())
        for weight, gaussian in zip(mixture.weights, mixture.components, strict=True)
    ]
    assert np.allclose(path_score(mixture, new), -np.log(sum(densities)), rtol=1e-8)
    # What lies between two kinds of InD images is OOD to a mixture, and the most usual to one Gaussian.
    between = clusters(300, seed=4).mean(dim=0, keepdim=True)
    assert float(path_score(mixture, between)) > float(path_score(mixture, new).max())
    assert float(path_score(fit_path(clusters(300, seed=4)), between)) == 0


def test_one_component_is_the_gaussian():
    values, new = clusters(50, seed=6), clusters(9, seed=7)
    gaussian = fit_path(values, 1)
    assert isinstance(gaussian, PathGaussian)
    assert gaussian == fit_path(values)
    alone = path_score(PathMixture(weights=(1.0,), components=(gaussian,)), new)
    constant = multivariate_normal(gaussian.mean, gaussian.covariance).logpdf(gaussian.mean)
    assert np.allclose(alone, path_score(gaussian, new) - constant, rtol=1e-12)


def test_a_mixture_of_few_images_is_refused():
    values = clusters(20, seed=8)
    with pytest.raises(SettingError, match="mixture of 3 Gaussians of 6 statistics is fitted on at least 21 images"):
        fit_path(values, 3)
    assert len(fit_path(values, 2).components) == 2


def test_a_variants_mixture_is_fitted_and_scores(images, denoiser, classifier):
    train = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    schedule = trailing_schedule(denoiser.alphas_cumprod, 10)
    [end] = invert(denoiser, denoiser.encode(train), schedule, [4], clip=True)
    detector = DiffGuard(classifier, denoiser, MIXED).fit([(images, None)], accept=0.5, train=[(train, None)])
    assert len(detector.variant.path.components) == 2
    [new] = invert(denoiser, denoiser.encode(images), schedule, [4], clip=True)
    expected = path_score(fit_path(end.path, 2), new.path)
    assert np.allclose(detector.predict(images), expected, rtol=1e-2, atol=1e-2)


def test_statistics_that_always_agree_can_be_fitted():
    values = torch.randn(20, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64).expand(-1, 6).clone()
    values[:, 5] = 0.0
    assert path_score(fit_path(values), values).isfinite().all()
    assert path_score(fit_path(values, 2), values).isfinite().all()
    with pytest.raises(SettingError, match="at least 7 images; there are 6"):
        fit_path(values[:6])


def test_a_variants_gaussian_comes_from_the_training_images_alone(images, denoiser, classifier):
    fitted = fit_variant(VARIANT, denoiser, classifier, [images[:4]], [images[4:8], images[8:]])
    schedule = trailing_schedule(denoiser.alphas_cumprod, 10)
    [end] = invert(denoiser, denoiser.encode(images[4:]), schedule, [4], clip=True)
    assert not fitted.needs_fit
    assert fitted.path.mean == pytest.approx(end.path.mean(dim=0).tolist(), rel=1e-4, abs=1e-6)
    assert np.allclose(fitted.path.covariance, fit_path(end.path).covariance, rtol=1e-2)
    other = fit_variant(VARIANT, denoiser, classifier, [images[:1]], [images[4:8], images[8:]])
    assert other.path == fitted.path
    with pytest.raises(SettingError, match="at least 7 images; there are 0"):
        fit_variant(VARIANT, denoiser, classifier, [images])


def test_an_adaptive_stop_is_set_first(images, denoiser, classifier):
    variant = VARIANT.model_copy(update={"stop": STOP})
    fitted = fit_variant(variant, denoiser, classifier, [images], [images])
    assert not fitted.needs_fit
    assert fitted.stop.thresholds["psnr"] is not None


def test_the_detector_keeps_the_images_of_the_threshold_apart(images, denoiser, classifier):
    detector = DiffGuard(classifier, denoiser, VARIANT)
    with pytest.raises(RequiresFittingException, match="distance path needs InD images"):
        detector.predict(images)
    calibration = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    detector.fit([(calibration[:30], None), (calibration[30:], None)], accept=0.9)
    rest = fit_variant(VARIANT, denoiser, classifier, [], [calibration[1::2]])
    assert np.allclose(detector.variant.path.mean, rest.path.mean, rtol=1e-4, atol=1e-6)
    scores = detector.predict(calibration[::2]).sort().values
    assert detector.threshold == pytest.approx(float(scores[18]), rel=1e-3)  # ceil(.9 * 21)-th of 20
    found = verdicts(detector, images)
    assert [each.is_ood for each in found] == (detector.predict(images) > detector.threshold).tolist()
    with pytest.raises(SettingError, match="path makes no reconstruction that a picture could show"):
        detector.picture(images)


def test_the_detector_takes_training_images(images, denoiser, classifier):
    detector = DiffGuard(classifier, denoiser, VARIANT)
    detector.fit([(images, None)], accept=0.5, train=[(images.flip(0)[:9], None)])
    expected = fit_variant(VARIANT, denoiser, classifier, [], [images.flip(0)[:9]])
    assert np.allclose(detector.variant.path.mean, expected.path.mean, rtol=1e-4, atol=1e-6)
    assert detector.threshold == pytest.approx(float(detector.predict(images).sort().values[6]), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": {"kind": "label"}}, "guidance: distance path makes no reconstruction"),
        ({"against": "unconditional"}, "against: distance path makes no reconstruction"),
        ({"stop": 1}, "stop: distance path takes differences between steps"),
        ({"stop": {"max_level": 5, "thresholds": {"psnr": 50}}}, "stop: distance path takes differences"),
        ({"distance": "l1", "path": {"mean": [0] * 6, "covariance": [[0] * 6] * 6}}, "path: it belongs to distance"),
        ({"path": {"mean": [0] * 5, "covariance": [[0] * 6] * 6}}, "path.gaussian.mean"),
        ({"path": 3}, "path.gaussian: Input should be a valid dictionary"),
        ({"path": {"weights": [1.0], "components": []}}, "path.mixture: Value error, it has 0 components and weights"),
        ({"path": {"weights": [0.5], "components": [ONE]}}, "path.mixture: Value error, its weights add up to 0.5"),
        (
            {"path": {"weights": [0.0, 1.0], "components": [ONE, ONE]}},
            "path.mixture.weights.0: Input should",
        ),
        ({"path": {"weights": [float("nan")], "components": [ONE]}}, "path.mixture.weights.0"),
        (
            {"path": {"weights": [1.0], "components": [ONE]}, "path_components": 3},
            "with path_components 1, not 3",
        ),
        ({"path": ONE, "path_components": 3}, "with path_components 1, not 3"),
        ({"path_components": 0}, "path_components: Input should be greater"),
        ({"distance": "l1", "path_components": 3}, "path_components: it belongs to distance path alone"),
        ({"against": "gain"}, "against: distance path makes no reconstruction"),
        ({"distance": "l1", "against": "gain"}, "against: gain compares guidance with none, and this variant has none"),
        ({"distance": "pth"}, "'pth' is not one of l1, "),
    ],
)
def test_what_does_not_go_with_a_path_is_named(changes, message):
    values = {"stop": 4, "guidance": {"kind": "none"}, "distance": "path", **changes}
    with pytest.raises(SettingError, match="variant: ") as error:
        parse_settings(Variant, values, "variant")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_only_a_fitted_path_is_in_a_variants_values():
    """Score folders are named by them: what has no path keeps its name."""
    assert "path" not in Variant(stop=4, guidance=LabelGuidance(), distance="l1").model_dump(mode="json")
    assert "path" not in VARIANT.model_dump(mode="json")
    fitted = VARIANT.model_copy(update={"path": fit_path(torch.eye(6).repeat(2, 1).double())})
    written = fitted.model_dump(mode="json")
    assert written["path"].keys() == {"mean", "covariance"}
    assert "path_components" not in written
    assert Variant.model_validate(written) == fitted
    mixed = MIXED.model_copy(update={"path": fit_path(clusters(30, seed=0), 2)})
    assert MIXED.model_dump(mode="json")["path_components"] == 2
    assert Variant.model_validate_json(mixed.model_dump_json()) == mixed
