"""Labels in another order than the classes: told before a run and in it, and never where nobody could know."""

import numpy as np
import pytest
import torch
from own_project import own_benchmark, with_code, write_own
from PIL import Image
from tiny_models import save_conditional

from diffguard.cli.main import main
from diffguard.errors import DataError, SettingError
from tasks.calibrate import calibrate
from tasks.config.benchmark import DENOISER
from tasks.config.run import open_run
from tasks.evaluate.stage import evaluate
from tasks.models.label_order import check_order, label_order
from tasks.prepare.stage import prepare_if_changed
from tasks.score.stage import score
from tasks.train.stage import train

NUMBERS = ["5", "6", "7", "8", "9", "10"]
WORDS = ["five", "six", "seven", "eight", "nine", "ten"]

CODE = """
import torch
from torch import nn

class Brightness(nn.Module):
    '''Of six classes, each a shade, in the order that it was trained in.'''
    def __init__(self, outputs=6):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(6, outputs)
        self.num_classes = outputs
        for weights in self.parameters():
            nn.init.zeros_(weights)
    @property
    def cam_layer(self):
        return self.conv
    def features(self, x):
        shades = torch.arange(6) * 36 + 37
        return -(x.mean(dim=(1, 2, 3))[:, None] * 255 - shades.to(x)).abs()
    def forward(self, x):
        found = self.features(x)
        return torch.cat([found, found.new_full((len(x), self.num_classes - 6), -1e3)], dim=1)

class Guess(Brightness):
    def features(self, x):
        return torch.stack([(x * 255).sum(dim=(1, 2, 3)) * k % 7 for k in (3, 5, 11, 13, 17, 19)], dim=1)

def knows_more():
    return Brightness(9)
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    with with_code(tmp_path_factory.mktemp("code"), shades=CODE):
        yield


@pytest.fixture
def project(tmp_path, monkeypatch, code):
    """Makes a project with these class folders, of which the classifier knows the first as the darkest."""

    def make(names, maker="Brightness", **source):
        rng = np.random.default_rng(0)
        folders = {f"ind/{name}": number * 36 + 37 for number, name in enumerate(names)} | {"near": 128, "far": 128}
        for folder, shade in folders.items():
            (tmp_path / "own" / folder).mkdir(parents=True, exist_ok=True)
            for number in range(24):
                pixels = rng.integers(shade - 10, shade + 11, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "own" / folder / f"{number:02}.png")
        save_conditional(tmp_path / "own" / "denoiser", 6)
        benchmark = own_benchmark()
        benchmark["ind"]["animals"]["source"].update(source)
        benchmark["ind"]["animals"]["splits"] = {"calibration": 72, "test": "rest"}
        benchmark["classifiers"] = {"mine": {"kind": "object", "object": f"shades:{maker}"}}
        benchmark |= {"detectors": ["msp"], "default": "msp"}
        benchmark["classes"] = source.get("classes")
        write_own(monkeypatch, tmp_path, benchmark)
        return str(tmp_path / "own")

    return make


def doctor(root, capsys):
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--benchmark", "mine", "--root", root])
    return end.value.code, capsys.readouterr().out


def test_folders_that_are_numbers_have_two_orders(project, capsys):
    root = project(NUMBERS)
    code, printed = doctor(root, capsys)
    assert code == 1
    assert "set sort: numbers (5, 6, 7, 8, …) or sort: text (10, 5, 6, 7, …), as in training" in printed
    with pytest.raises(SettingError, match="its class folders are numbers"):
        prepare_if_changed(open_run(benchmark="mine", root=root).benchmark, open_run("mine", root=root).home, 0)


def test_as_numbers_the_classifier_is_right(project, capsys):
    root = project(NUMBERS, sort="numbers")
    code, printed = doctor(root, capsys)
    assert (code, "labels" in printed) == (0, False)
    assert open_run("mine", root=root).classes == NUMBERS


@pytest.mark.parametrize("prepared", [False, True])
def test_sorted_as_text_it_is_wrong_and_that_is_told(prepared, project, capsys):
    root = project(NUMBERS, sort="text")
    run = open_run("mine", root=root)
    if prepared:
        prepare_if_changed(run.benchmark, run.home, 0)
    code, printed = doctor(root, capsys)
    assert code == 1
    [line] = [line for line in printed.splitlines() if line.startswith("FAIL")]
    assert "mine.yaml: classifier mine: of 64 InD images" in line or prepared
    assert "0.0% are classified rightly, and 100.0% if its labels are in another order: '10' is its label 5, " in line
    assert line.endswith("give classes in the classifier's order: [5, 6, 7, 8, 9, 10]")


def test_the_stages_tell_it_too(project):
    """With words for names AUROC stays as it was, and each decision would name another class."""
    root = project(WORDS)
    run = open_run("mine", root=root)
    prepare_if_changed(run.benchmark, run.home, 0)
    run = open_run("mine", root=root)
    for model in (DENOISER, "mine"):
        train(run, model, 0)
    items = score(run)
    for stage in (calibrate, evaluate):
        with pytest.raises(DataError, match=r"give classes in the classifier's order: \[five, six, seven, eight"):
            stage(run, items)
    assert not (run.results / "calibration.json").exists()
    assert not (run.results / "metrics.json").exists()


def test_a_classifier_that_guesses_is_warned_of(project, capsys):
    code, printed = doctor(project(WORDS, maker="Guess", classes=WORDS), capsys)
    assert code == 0
    [line] = [line for line in printed.splitlines() if line.startswith("warn  labels")]
    assert "which is no more than guessing among 6 classes" in line


def test_a_classifier_of_more_labels(project, capsys):
    code, printed = doctor(project(WORDS, maker="knows_more", classes=WORDS), capsys)
    assert (code, "labels   " in printed) == (0, False)


def predictions(true, accuracy, order=None, seed=0):
    """Of a classifier that is right so often, with its labels in this order."""
    rng, true = np.random.default_rng(seed), np.asarray(true)
    classes = true.max() + 1
    order = np.arange(classes) if order is None else np.asarray(order)
    wrong = rng.integers(0, classes, len(true))
    return np.where(rng.random(len(true)) < accuracy, order[true], wrong)


def test_two_classes_that_are_swapped():
    true = np.repeat(np.arange(10), 20)
    found = label_order(true, predictions(true, 0.9, [1, 0, *range(2, 10)]), 10)
    assert found.moved == {0: 1, 1: 0}
    assert found.accuracy < 0.8 < 0.85 < found.best
    with pytest.raises(DataError, match=r"'a' is its label 1, not 0, 'b' is its label 0, not 1; give classes in the"):
        check_order("c", list("abcdefghij"), true, predictions(true, 0.9, [1, 0, *range(2, 10)]))


def test_an_order_within_more_labels():
    true = np.repeat(np.arange(5), 20)
    with pytest.raises(DataError, match=r"'a' is its label 100, not 0, .*give classes in the classifier's order, all"):
        check_order("c", list("abcde"), true, true + 100)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(("classes", "each"), [(2, 12), (6, 10), (10, 6), (10, 50), (100, 3), (1000, 1)])
def test_chance_is_never_taken_for_an_order(classes, each, seed):
    """Of a right classifier, a weak one, one that guesses, and one that says the same of all."""
    true = np.repeat(np.arange(classes), each)
    for accuracy in (0.95, 0.3, 0.0):
        assert label_order(true, predictions(true, accuracy, seed=seed), classes).moved == {}
    assert label_order(true, np.full(len(true), seed % classes), classes).moved == {}


def test_nothing_to_say_of_no_images():
    found = label_order([], [], 4)
    assert (found.images, found.moved, found.is_guessing) == (0, {}, False)
    assert check_order("c", ["a", "b"], torch.empty(0), torch.empty(0)) == ""


def test_a_mix_up_that_is_real_but_mild_is_no_other_order():
    """Cats are taken for dogs a little more often than not, dogs are not taken for cats."""
    rng = np.random.default_rng(0)
    true = np.repeat([0, 1, 2], 200)
    guess = np.where((true == 0) & (rng.random(600) < 0.55), 1, true)
    assert label_order(true, guess, 3).moved == {}


def test_very_many_classes_are_not_assigned():
    true = np.arange(20_000)
    assert label_order(true, true, 20_000).accuracy == 1
    assert label_order(true, (true + 1) % 20_000, 20_000).is_guessing
