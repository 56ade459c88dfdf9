"""The queue between requests and the model, with a model that a test can hold up."""

import threading
import time

import pytest

from diffguard.serving.batching import Batcher, BusyError


class Model:
    """Doubles numbers, when it is let; it notes what it was asked."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.started = threading.Event()
        self.calls = []

    def __call__(self, images, reconstructions):
        self.calls.append((list(images), reconstructions))
        self.started.set()
        assert self.may.wait(10)
        if any(each < 0 for each in images):
            raise ValueError("negative")
        return [2 * each for each in images]


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def batcher(model):
    batcher = Batcher(model, max_batch=4, max_waiting=6)
    yield batcher
    model.may.set()
    batcher.close(10)


def held(model, batcher):
    """A request that the model is at, so that the next ones wait."""
    first = batcher.submit([0], False)
    assert model.started.wait(10)
    return first


def test_requests_that_wait_are_answered_in_one_call(model, batcher):
    first = held(model, batcher)
    others = [batcher.submit(images, False) for images in ([1], [2, 3], [4], [5])]
    model.may.set()
    assert [each.result(10) for each in (first, *others)] == [[0], [2], [4, 6], [8], [10]]
    assert [images for images, _ in model.calls] == [[0], [1, 2, 3, 4], [5]]


def test_a_request_larger_than_a_batch_goes_alone(model, batcher):
    held(model, batcher)
    small, large = batcher.submit([1], False), batcher.submit([2, 3, 4, 5, 6], False)
    model.may.set()
    assert large.result(10) == [4, 6, 8, 10, 12]
    assert small.result(10) == [2]
    assert [images for images, _ in model.calls] == [[0], [1], [2, 3, 4, 5, 6]]


def test_requests_for_reconstructions_are_a_batch_of_their_own(model, batcher):
    held(model, batcher)
    asked = [batcher.submit([number], number % 2 == 0) for number in (1, 2, 3, 4)]
    model.may.set()
    assert [each.result(10) for each in asked] == [[2], [4], [6], [8]]
    assert model.calls[1:] == [([1, 3], False), ([2, 4], True)]


def test_a_full_queue_refuses(model, batcher):
    held(model, batcher)
    batcher.submit([1] * 6, False)
    with pytest.raises(BusyError):
        batcher.submit([1], False)


def test_an_empty_queue_takes_any_request(model, batcher):
    held(model, batcher)
    large = batcher.submit([1] * 7, False)
    model.may.set()
    assert large.result(10) == [2] * 7


def test_one_requests_trouble_is_not_the_others(model, batcher):
    held(model, batcher)
    good, bad, also_good = (batcher.submit([number], False) for number in (1, -1, 2))
    model.may.set()
    assert good.result(10) == [2]
    assert also_good.result(10) == [4]
    with pytest.raises(ValueError, match="negative"):
        bad.result(10)
    assert batcher.submit([5], False).result(10) == [10]


def test_a_request_that_was_given_up_costs_nothing(model, batcher):
    held(model, batcher)
    given_up, other = batcher.submit([1], False), batcher.submit([2], False)
    assert given_up.cancel()
    model.may.set()
    assert other.result(10) == [4]
    assert [images for images, _ in model.calls] == [[0], [2]]


def test_it_knows_whether_the_model_is_well(model, batcher):
    assert batcher.answered_seconds_ago is None
    first = held(model, batcher)
    time.sleep(0.02)
    assert batcher.busy_seconds > 0.01
    model.may.set()
    first.result(10)
    assert batcher.answered_seconds_ago < 10
    with pytest.raises(ValueError, match="negative"):
        batcher.submit([-1], False).result(10)
    assert batcher.answered_seconds_ago is None


def test_too_few_answers_are_an_error():
    batcher = Batcher(lambda images, _: [1], max_batch=4, max_waiting=4)
    with pytest.raises(RuntimeError, match="1 answers for 2 images"):
        batcher.submit([1, 2], False).result(10)
    batcher.close(10)


def test_closing_answers_what_waits_and_takes_no_more(model, batcher):
    first = held(model, batcher)
    waiting = batcher.submit([1], False)
    model.may.set()
    batcher.close(10)
    assert (first.result(0), waiting.result(0)) == ([0], [2])
    with pytest.raises(BusyError):
        batcher.submit([2], False)
