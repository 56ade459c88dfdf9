"""How the network is called: what is measured decides, and what would corrupt memory is not tried."""

import logging
from copy import deepcopy

import pytest
import torch

from diffguard.engine import Engine, Request, Sample, pick_threads, tune
from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.settings import LabelGuidance, Variant
from diffguard.utils.processor import flushed_denormals


class Machine:
    """A machine on which a call takes what the layout of its weights, denormals, precision and threads cost."""

    def __init__(self, denoiser, cost):
        self.denoiser, self.cost, self.now = denoiser, cost, 0.0

    def __getattr__(self, name):
        return getattr(self.denoiser, name)

    def networks(self):
        return self.denoiser.networks()

    def lay_out(self, memory_format):
        self.denoiser.lay_out(memory_format)
        return self

    def thread_time(self):
        return self.perf_counter()

    def perf_counter(self):
        return self.now

    def eps(self, x, timestep, label):
        weight = self.denoiser.unet.down_blocks[0].resnets[0].conv1.weight
        self.now += self.cost(
            channels_last=weight.is_contiguous(memory_format=torch.channels_last),
            flushed=bool(torch.tensor(1e-40) * 1 == 0),
            lowered=torch.is_autocast_enabled("cpu"),
            threads=torch.get_num_threads(),
        )
        return torch.zeros_like(x)


@pytest.fixture
def own(denoiser):
    return PixelDenoiser(deepcopy(denoiser.unet), denoiser.scheduler)


@pytest.fixture
def machine(own, monkeypatch):
    def with_cost(cost):
        made = Machine(own, cost)
        monkeypatch.setattr("diffguard.engine.tuning.time", made)
        return made

    return with_cost


def is_channels_last(denoiser):
    return not denoiser.unet.down_blocks[0].resnets[0].conv1.weight.is_contiguous()


@pytest.mark.parametrize("loaded", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_layout_is_taken_whatever_was_loaded(loaded, faster, machine, own):
    own.lay_out(loaded)
    tuning = tune(machine(lambda channels_last, **_: 1.0 if channels_last == faster else 1.2), "float32", largest=4)
    assert tuning.channels_last is faster
    assert is_channels_last(own) is faster


def test_a_layout_that_gains_nothing_is_not_changed(machine, own):
    for loaded in (torch.channels_last, torch.contiguous_format):
        own.lay_out(loaded)
        tuning = tune(machine(lambda **_: 1.0), "float32", largest=4)
        assert tuning.channels_last is (loaded == torch.channels_last)
        assert is_channels_last(own) is tuning.channels_last


@pytest.mark.parametrize("kept_cost", [1.0, 1.5])
def test_denormals_are_flushed_only_where_that_gains(kept_cost, machine):
    before = bool(torch.tensor(1e-40) * 1 == 0)
    tuning = tune(machine(lambda flushed, **_: 1.0 if flushed else kept_cost), "float32", largest=2)
    assert tuning.flushes_denormals is (kept_cost > 1)
    assert bool(torch.tensor(1e-40) * 1 == 0) is before


def test_an_engine_flushes_within_its_network_calls_alone(machine, classifier, images):
    seen = []

    def cost(flushed, **_):
        seen.append(flushed)
        return 1.0 if flushed else 2.0

    made = machine(cost)
    tuning = tune(made, "float32", slots=4)
    seen.clear()
    variant = Variant(stop=2, guidance=LabelGuidance(), distance="l1")
    engine = Engine(made, [Request(classifier, variant)], slots=tuning)
    list(engine.run(Sample(row, image) for row, image in enumerate(images)))
    assert set(seen) == {True}
    with flushed_denormals(torch.device("cpu"), False):
        assert bool(torch.tensor(1e-40) * 1 != 0)


def test_it_measures_in_the_precision_asked_for_and_in_one_thread(machine):
    seen = set()

    def cost(lowered, threads, **_):
        seen.add((lowered, threads))
        return 1.0

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert tune(machine(cost), "bfloat16", largest=2).precision == "bfloat16"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == {(True, 1)}


@pytest.mark.parametrize(("alone", "picked"), [(0.5, 1), (1.2, 1), (2.0, 2)])
def test_one_image_is_evaluated_in_the_number_of_threads_that_is_faster(alone, picked, machine):
    made = machine(lambda threads, **_: alone if threads == 1 else 1.0)
    tuning = tune(made, "float32", slots=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert pick_threads(made, tuning) == picked
    finally:
        torch.set_num_threads(threads)


def test_four_channels_are_never_laid_out_channels_last_on_a_processor(denoiser, machine, own):
    unet = own.unet
    unet.conv_in = torch.nn.Conv2d(4, unet.conv_in.out_channels, 3, padding=1)
    made = machine(lambda channels_last, **_: 1.0 if channels_last else 9.0)
    own.lay_out(torch.contiguous_format)
    assert tune(made, "float32", slots=2).channels_last is False
    own.lay_out(torch.channels_last)
    assert tune(made, "float32", slots=2).channels_last is False
    assert not is_channels_last(own)


def test_what_was_chosen_is_logged(machine, own, caplog):
    own.lay_out(torch.contiguous_format)
    caplog.set_level(logging.INFO, "diffguard")
    tune(machine(lambda **_: 0.01), "float32", slots=2)
    [line] = [record.message for record in caplog.records if record.name == "diffguard.engine.tuning"]
    assert "2 evaluations a call in float32, weights contiguous, denormals kept: 200 evaluations/s" in line
