"""What was chosen on validation, as the report says it."""

from tasks.evaluate.report import choices, report

BAND = {
    "images": {"ind": 63, "near": 100, "far": 120},
    "stated_loss": 0.002,
    "confidence": 0.95,
    "share": 1.0,
    "loss": {"near": {"value": 0.0, "upper": 0.0}, "far": {"value": 0.0, "upper": 0.0}},
    "images_needed": {"ind": 1300, "near": 2064, "far": 2477},
}
NARROWER = {
    "share": 0.437,
    "loss": {"near": {"value": 0.0004, "upper": 0.0019}, "far": {"value": -0.011, "upper": -0.002}},
    "images_needed": None,
}
FUSION = {
    "images": {"ind": 63, "near": 100, "far": 100},
    "confidence": 0.95,
    "auroc": {"near": 0.98, "far": 0.99, "mean": 0.985},
    "runner_up": {
        "members": ["msp", "knn"],
        "auroc": {"near": 0.99, "far": 0.99, "mean": 0.99},
        "difference": {"value": -0.005, "low": -0.02, "high": 0.01},
    },
}


def line(fitted, seeds=1):
    metrics = {"strong": {"row": {"fitted": seeds * [fitted]}, "msp": {}}}
    assert report(metrics).endswith(f"Chosen on validation:\n\n{choices(metrics)}")
    return choices(metrics)


def test_a_band_with_what_it_loses():
    assert line({"band": [-0.3, None], "validation": BAND | NARROWER}) == (
        "- row (strong): 44 % of a stream goes on, loss near 0.0 (at most 0.2), far -1.1 (at most -0.2) points "
        "where 0.2 points may be lost"
    )


def test_how_many_images_a_stated_loss_would_take():
    assert line({"band": [None, None], "validation": BAND}) == (
        "- row (strong): everything goes on: to show a loss of at most 0.2 points takes about 1,300 InD, 2,100 near, "
        "2,500 far images; there are 63 InD, 100 near, 120 far"
    )
    assert line({"band": [None, None], "validation": BAND | {"images_needed": None}}) == (
        "- row (strong): everything goes on: no number of such images would show a loss of at most 0.2 points"
    )


def test_the_members_of_a_fusion_beside_the_runner_up():
    says = "msp + cfg-w1, mean AUROC 98.5, -0.5 (-2.0 to +1.0) against the runner-up, msp + knn"
    fitted = {"members": ["msp", "cfg-w1"], "validation": FUSION}
    assert line(fitted) == f"- row (strong): {says}"
    assert line(fitted, seeds=2).splitlines() == [
        f"- row (strong, training seed {number} of 2): {says}" for number in (1, 2)
    ]


def test_without_a_choice_nothing_is_said():
    assert choices({"strong": {"msp": {}}}) == ""
    assert "validation" not in report({"strong": {"msp": {}}})
