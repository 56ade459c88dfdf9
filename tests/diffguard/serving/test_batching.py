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


def test_a_queue_is_full_at_a_number_of_bytes(model):
    batcher = Batcher(model, max_batch=4, max_waiting=6, max_bytes=100, size_of=lambda image: image)
    held(model, batcher)
    waiting = batcher.submit([60], False)
    with pytest.raises(BusyError):
        batcher.submit([41], False)
    other = batcher.submit([40], False)
    model.may.set()
    assert [waiting.result(10), other.result(10)] == [[120], [80]]
    batcher.close(10)


def test_what_could_not_be_answered_in_time_is_refused():
    """At 20 images a second, in the fastest call, the eleventh would wait for more than 0.5 seconds."""
    started, may = threading.Event(), threading.Event()
    may.set()

    def decide(images, _):
        started.set()
        time.sleep(len(images) / 20)
        assert may.wait(10)
        return images

    def held():
        started.clear()
        may.clear()
        first = batcher.submit([0], False)
        assert started.wait(10)
        return first, batcher.submit([1] * 4, False)

    batcher = Batcher(decide, max_batch=4, max_waiting=100, seconds=0.5)
    first, waiting = held()
    batcher.check_room(50)  # a single image, the first one too, says nothing of the speed of many
    may.set()
    waiting.result(10)
    first, waiting = held()
    batcher.check_room(2)
    for images in (7, 50):
        with pytest.raises(BusyError):
            batcher.check_room(images)
        with pytest.raises(BusyError):
            batcher.submit([1] * images, False)
    may.set()
    assert first.result(10) == [0]
    assert waiting.result(10) == [1] * 4
    batcher.close(10)


def test_a_batch_may_wait_for_a_model_however_slow(model):
    batcher = Batcher(model, max_batch=4, max_waiting=100, seconds=1e-9)
    model.may.set()
    batcher.submit([1] * 4, False).result(10)
    model.may.clear()
    model.started.clear()
    held(model, batcher)
    asked = [batcher.submit([1, 2], False) for _ in range(2)]
    with pytest.raises(BusyError):
        batcher.submit([1], False)
    model.may.set()
    assert [each.result(10) for each in asked] == [[2, 4], [2, 4]]
    batcher.close(10)


def test_what_was_given_up_takes_no_room(model, batcher):
    held(model, batcher)
    given_up = batcher.submit([1] * 6, False)
    with pytest.raises(BusyError):
        batcher.check_room(1)
    assert batcher.waiting_images == 6
    assert given_up.cancel()
    batcher.check_room(6)
    assert batcher.waiting_images == 0


def test_the_oldest_request_is_in_the_next_call(model, batcher):
    """Small ones fill what a large one leaves of a batch, and do not keep it waiting."""
    held(model, batcher)
    asked = [batcher.submit(images, False) for images in ([1, 1, 1], [2, 2], [3])]
    model.may.set()
    assert [each.result(10) for each in asked] == [[2, 2, 2], [4, 4], [6]]
    assert [images for images, _ in model.calls] == [[0], [1, 1, 1, 3], [2, 2]]


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
