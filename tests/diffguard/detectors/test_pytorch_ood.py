"""pytorch-ood's detectors by settings score as by its own use, on networks of every kind."""

from functools import cache

import pytest
import torch
import yaml
from pytorch_ood import detector as ood
from scored_networks import NETWORKS, SHAPE, network
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torchvision.models import resnet18

from diffguard.detectors.baselines import detect, fit_baseline, needs_fit, views_of
from diffguard.detectors.parts import Parts, stored_view
from diffguard.errors import DataError, SettingError
from diffguard.models.classifiers.base import predict_logits
from diffguard.models.classifiers.wrapped import NetworkClassifier
from diffguard.settings import Baseline, parse_settings
from tasks.config.project import ROOT

CPU = torch.device("cpu")
LISTED = {
    name: parse_settings(Baseline, values, name)
    for name, values in yaml.safe_load((ROOT / "params.yaml").read_text())["score"]["baselines"].items()
    if values["detector"].startswith("pytorch_ood") and values["sees"] != "pixels"
}
OTHERS = {
    "entropy": ("Entropy", "logits", {}),
    "temperature": ("TemperatureScaling", "logits", {}),
    "openmax": ("OpenMax", "logits", {"tailsize": 5, "alpha": 3}),
    "odin": ("ODIN", "logits", {}),
    "gradnorm": ("GradNorm", "logits", {}),
    "grad-uncertainty": ("GradUncertainty", "logits", {}),
    "mahalanobis-odin": ("MahalanobisODIN", "features", {}),
    "gmm": ("GMM", "features", {"reg": 0.01}),
    "pnml": ("PNML", "features", {}),
    "lts": ("LTS", "features", {}),
    "vra": ("VRA", "maps", {}),
    "rankfeat": ("RankFeat", "maps", {}),
}
ROWS = {
    **LISTED,
    **{
        name: Baseline(detector=f"pytorch_ood.detector:{kind}", sees=sees, arguments=arguments)
        for name, (kind, sees, arguments) in OTHERS.items()
    },
}
MAPS = [name for name, row in ROWS.items() if row.sees == "maps"]
WITH_MAPS = ["conv", "densenet"]

opened = cache(network)


def own_use(row, net, *, of_features=False):
    """The detector as pytorch-ood's documentation builds it."""
    kind = getattr(ood, row.detector.partition(":")[2])
    arguments = dict(row.arguments)
    if kind in (ood.ViM, ood.DICE):
        arguments |= {"w": net.linear.weight, "b": net.linear.bias}
    if kind in (ood.fDBD, ood.NNGuide, ood.NCI, ood.SHE, ood.PNML, ood.LTS):
        arguments["head"] = net.linear
    if of_features:
        return kind(
            lambda x: net.classifier.features(x)[:, :, None, None],
            lambda maps: net.linear(maps.flatten(1)),
            **arguments,
        )
    if row.sees == "maps":
        return kind(net.maps, net.head, **arguments)
    if kind is ood.NACUE:
        arguments["layers"] = [net.classifier.cam_layer]
    return kind(net.classifier.features if row.sees == "features" else net.classifier, **arguments)


def expected_scores(detector, net):
    if detector.requires_fit:
        torch.manual_seed(0)
        detector.to("cpu").fit(net.batches)
    return detector.predict(net.new).detach()


def scores(detector, net):
    with torch.no_grad():
        return detect(detector, net.new, predict_logits(net.classifier, net.new))


def assert_equal(found, expected):
    assert found.shape == expected.shape
    assert torch.isfinite(expected).all()
    assert torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ROWS if name not in MAPS])
@pytest.mark.parametrize("kind", NETWORKS)
def test_scores_are_those_of_its_own_use(kind, name):
    net, row = opened(kind), ROWS[name]
    detector = fit_baseline(name, row, net.classifier, net.batches, CPU)
    found = scores(detector, net)
    if row.detector.endswith(":NACUE"):
        # The weights are frozen, so the graph starts at the images.
        own = own_use(row, net).fit([(images.clone().requires_grad_(), labels) for images, labels in net.batches])
        expected = own.predict(net.new.clone().requires_grad_())
    else:
        expected = expected_scores(own_use(row, net), net)
    assert_equal(found, expected)
    assert found.std() > 0


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("kind", WITH_MAPS)
def test_scores_of_maps_are_those_of_its_own_use(kind, name):
    net = opened(kind)
    found = scores(fit_baseline(name, ROWS[name], net.classifier, net.batches, CPU), net)
    assert_equal(found, expected_scores(own_use(ROWS[name], net), net))
    assert found.std() > 0


@pytest.mark.parametrize("name", [name for name in MAPS if name != "rankfeat"])
@pytest.mark.parametrize("kind", ["vit", "timm-vit"])
def test_a_vision_transformer_has_features_in_the_place_of_maps(kind, name):
    net, row = opened(kind), ROWS[name]
    with pytest.raises(SettingError) as error:
        fit_baseline(name, row, net.classifier, net.batches, CPU)
    message = str(error.value)
    assert message.startswith(f"score.baselines.{name}: cam_layer of VisionTransformer outputs [2, 5, 16], no feature")
    assert "choose sees: features" in message
    assert "\n" not in message
    row = row.model_copy(update={"sees": "features"})
    found = scores(fit_baseline(name, row, net.classifier, net.batches, CPU), net)
    expected = expected_scores(own_use(row, net, of_features=True), net)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", WITH_MAPS)
def test_detectors_of_several_layers_get_the_network_in_parts(kind):
    net = opened(kind)
    gram = Baseline(detector="pytorch_ood.detector:Gram", sees="layers", layers=net.layers)
    own = ood.Gram(net.head, net.parts, num_classes=4)
    assert_equal(scores(fit_baseline("gram", gram, net.classifier, net.batches, CPU), net), expected_scores(own, net))
    several = Baseline(detector="pytorch_ood.detector:MultiMahalanobis", sees="layers", layers=net.layers)
    own = ood.MultiMahalanobis(net.parts)
    found = scores(fit_baseline("several", several, net.classifier, net.batches, CPU), net)
    assert torch.allclose(found, expected_scores(own, net), rtol=1e-2)


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("gradnorm", "grad-uncertainty", "odin")])
def test_scores_are_the_same_once_it_is_fitted_on_what_is_stored(name):
    net, row = opened("conv"), ROWS[name]
    expected = scores(fit_baseline(name, row, net.classifier, net.batches, CPU), net)
    assert stored_view(row) == ("images" if row.sees in ("maps", "layers") else row.sees)
    values, labels = views_of(stored_view(row), net.classifier, net.batches)
    assert (values.dtype == torch.uint8) == (stored_view(row) == "images")
    stored = [(values.float() / 255 if values.dtype == torch.uint8 else values, labels)]
    detector = fit_baseline(
        name, row, net.classifier, stored if needs_fit(row) else [], CPU, seen=True, image_shape=SHAPE
    )
    assert torch.allclose(scores(detector, net), expected, rtol=1e-4, atol=1e-5)


def test_features_of_a_named_layer_are_pooled():
    net, knn = opened("densenet"), "pytorch_ood.detector:KNN"
    row = Baseline(detector=knn, sees="features", layer="features.transition1", arguments={"k": 3})
    assert stored_view(row) == "images"
    own = ood.KNN(lambda x: net.parts[0](x).mean(dim=(2, 3)), k=3)
    assert_equal(scores(fit_baseline("knn", row, net.classifier, net.batches, CPU), net), expected_scores(own, net))
    net = opened("timm-vit")
    row = row.model_copy(update={"layer": "blocks.0"})

    def tokens(x):
        embedded = net.classifier.network._pos_embed(
            net.classifier.network.patch_embed((x - net.classifier.mean) / net.classifier.std)
        )
        return net.classifier.network.blocks[0](embedded).mean(dim=1)

    found = scores(fit_baseline("knn", row, net.classifier, net.batches, CPU), net)
    assert_equal(found, expected_scores(ood.KNN(tokens, k=3), net))


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return NetworkClassifier(resnet18(num_classes=4), "layer4", size=40)


def head_of(classifier, layer=None, size=40):
    row = Baseline(detector="pytorch_ood.detector:ASH", sees="maps", layer=layer)
    ash = fit_baseline("ash", row, classifier, [], CPU, image_shape=(3, size, size))
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        maps = ash.backbone(images)
        assert torch.allclose(ash.head(maps), classifier(images), atol=1e-4)
    return ash.head, maps


def test_the_head_of_maps_is_their_mean_and_the_last_layer_where_that_is_the_network(resnet):
    head, maps = head_of(resnet)
    assert isinstance(head[-1], nn.Linear)
    assert maps.shape == (3, 512, 2, 2)


def test_the_head_of_an_earlier_layer_is_the_rest_of_the_network(resnet):
    head, maps = head_of(resnet, "layer2")
    with torch.no_grad():
        changed = torch.rand_like(maps)
        network = resnet.network
        expected = network.fc(network.avgpool(network.layer4(network.layer3(changed))).flatten(1))
        assert torch.allclose(head(changed), expected, atol=1e-4)


def test_maps_of_windows_have_their_channels_first():
    torch.manual_seed(0)
    swin = SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 1), num_classes=4
    )
    _, maps = head_of(NetworkClassifier(swin, size=32, fixed=True), size=32)
    assert maps.shape == (3, 16, 4, 4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"detector": "ASH", "sees": "maps", "layer": "layer9"}, r"ResNet has no module 'layer9'; it has conv1, bn1"),
        (
            {"detector": "ASH", "sees": "maps", "layer": "layer4.0.conv1"},
            r"ResNet does not make its logits of the maps of layer4\.0\.conv1 alone; choose a later layer",
        ),
        (
            {"detector": "SHE", "sees": "features", "layer": "layer3"},
            r"the last Linear layer of ResNet does not make its logits of these features.*; leave out layer",
        ),
        ({"detector": "SHE", "sees": "logits"}, r"SHE takes head, which there is of sees: features or maps or layers"),
        ({"detector": "ViM", "sees": "features"}, r"ViM cannot be built .*missing 1 required .* 'd'"),
        ({"detector": "ASH", "sees": "maps", "arguments": {"variant": "x"}}, r"ASH cannot be built"),
        ({"detector": "ASH", "sees": "maps", "arguments": {"percentile": 65}}, r"ASH cannot be built"),
        ({"detector": "MCM", "sees": "features"}, r"MCM cannot be built .*text_embeddings"),
        (
            {"detector": "Gram", "sees": "layers", "layers": ["layer1", "layer2.0.conv1"]},
            r"ResNet does not make its logits of the maps of layer2\.0\.conv1 alone",
        ),
        ({"detector": "Gram", "sees": "layers", "layers": ["fc"]}, r"fc of ResNet outputs \[2, 4\], no feature maps"),
    ],
)
def test_what_does_not_suit_is_said_in_one_line(resnet, row, message):
    row = Baseline(**{**row, "detector": f"pytorch_ood.detector:{row['detector']}"})
    images = torch.rand(8, 3, 40, 40, generator=torch.Generator().manual_seed(5))
    with pytest.raises(SettingError, match=rf"^score\.baselines\.mine: .*{message}") as error:
        fit_baseline("mine", row, resnet, [(images, torch.arange(8) % 4)], CPU)
    assert "\n" not in str(error.value)


def test_a_train_split_that_does_not_suit_is_said_in_one_line():
    net = opened("conv")
    few = [(net.train[:8], net.labels[:8])]
    with pytest.raises(DataError, match=r"^score\.baselines\.knn-50: .*KNN cannot be fitted .* \(k=50 exceeds"):
        fit_baseline("knn-50", ROWS["knn-50"], net.classifier, few, CPU)
    with pytest.raises(SettingError, match="knn-50: it is fitted on a split train, which this benchmark does not"):
        fit_baseline("knn-50", ROWS["knn-50"], net.classifier, [], CPU, image_shape=SHAPE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sees": "logits", "layer": "layer4"}, "layer: it belongs to sees: features or maps, not logits"),
        ({"sees": "maps", "layers": ["layer4"]}, "layers: they belong to sees: layers, not maps"),
        ({"sees": "layers", "layers": []}, "layers"),
        ({"sees": "weights"}, "sees"),
    ],
)
def test_a_layer_that_nothing_sees_is_refused(values, message):
    with pytest.raises(SettingError, match=message):
        parse_settings(Baseline, {"detector": "pytorch_ood.detector:ASH", **values}, "params.yaml")


def test_the_settings_of_stored_scores_are_as_they_were():
    """Score folders are named by the hash of these."""
    row = Baseline(detector="pytorch_ood.detector:KNN", sees="features", arguments={"k": 5})
    assert row.model_dump(mode="json") == {
        "detector": "pytorch_ood.detector:KNN",
        "sees": "features",
        "arguments": {"k": 5},
    }
    named = Baseline(detector="pytorch_ood.detector:ASH", sees="maps", layer="layer3")
    assert named.model_dump(mode="json")["layer"] == "layer3"
    assert Baseline(**named.model_dump(mode="json")) == named


def test_a_gradient_leaves_no_trace_in_the_classifier():
    net = opened("conv")
    detector = fit_baseline("nac", ROWS["nac"], net.classifier, net.batches, CPU)
    before = net.classifier(net.new)
    assert not scores(detector, net).requires_grad
    assert torch.equal(net.classifier(net.new), before)
    assert not before.requires_grad
    assert not any(parameter.requires_grad for parameter in net.classifier.parameters())
    assert not any(module._forward_hooks for module in net.classifier.modules())


def test_an_argument_of_the_settings_is_not_replaced():
    net = opened("conv")
    gram = Baseline(
        detector="pytorch_ood.detector:Gram", sees="layers", layers=net.layers, arguments={"num_poles_list": [2]}
    )
    _, arguments = Parts(gram, net.classifier, SHAPE).arguments(ood.Gram)
    assert arguments["num_poles_list"] == [2]
    assert arguments["num_classes"] == 4
    assert len(arguments["feature_layers"]) == 3


OWN = """
from pytorch_ood.api import FeaturesDetector


class Margin(FeaturesDetector):
    def __init__(self, encoder, head, scale=1.0, b=None):
        self.encoder, self.head, self.scale, self.bias = encoder, head, scale, b

    def predict(self, x):
        first, second = self.head(self.encoder(x)).topk(2, dim=1).values.T
        return self.scale * (second - first)
"""


def test_a_detector_of_a_module_elsewhere_by_one_entry(tmp_path, monkeypatch):
    (tmp_path / "own_margin.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    entry = yaml.safe_load("{detector: 'own_margin:Margin', sees: features, arguments: {scale: 2}}")
    net = opened("conv")
    row = parse_settings(Baseline, entry, "params.yaml")
    detector = fit_baseline("margin", row, net.classifier, [], CPU, image_shape=SHAPE)
    values = net.classifier(net.new).sort(dim=1).values
    assert_equal(scores(detector, net), 2 * (values[:, -2] - values[:, -1]))
    assert detector.head is net.linear
    assert torch.equal(detector.bias, net.linear.bias)
