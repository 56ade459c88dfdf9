"""What a row costs."""

import pandas as pd
import pytest

from tasks.config.run import open_run
from tasks.evaluate.cost import evaluations_per_image


@pytest.fixture(scope="module")
def run():
    return open_run()


def test_a_cascade_costs_what_a_stream_of_half_ind_images_costs(run):
    roles = {"a": "ind", "b": "near", "c": "far"}
    test = pd.DataFrame({"dataset": list(roles), "role": list(roles.values())})

    def cost(**evaluations):
        row = {"diffused": {name: {"evaluations": each} for name, each in evaluations.items()}}
        return evaluations_per_image(run, "pixel-knn-then-cfg-w1", row, {}, test)

    assert cost(a=2.0, b=4.0, c=8.0) == pytest.approx(2 / 2 + 4 / 4 + 8 / 4)
    assert cost(a=2.0, b=4.0, c=None) is None


def test_a_row_without_the_denoiser_costs_nothing(run):
    test = pd.DataFrame({"dataset": ["a"], "role": ["ind"]})
    assert evaluations_per_image(run, "knn", {}, {}, test) == 0


def test_what_was_chosen_is_what_costs(run):
    test = pd.DataFrame({"dataset": ["a", "b"], "role": ["ind", "near"]})
    steps = {"cfg-w1": pd.Series([4, 4])}
    chosen = {"fitted": [{"members": ["knn", "cfg-w1"]}]}
    assert evaluations_per_image(run, "fused-best", chosen, steps, test) == 8
    assert evaluations_per_image(run, "fused-best", {"fitted": [{"members": ["knn"]}]}, {}, test) == 0
