"""What a study's page concludes from its numbers."""

from pathlib import Path

import pytest

from tasks.config.study import Study
from tasks.studies.page import conclusion, curve_conclusion, difference_summary, index, section
from tasks.studies.results import verdict

ABOVE = {"says": "it is better", "source": "here", "measure": "near auroc", "of": "label", "above": "msp"}


def make(**claim):
    return Study(
        title="Scales",
        question="Which?",
        claim=ABOVE | claim,
        benchmarks=["mine"],
        rows=["msp"],
        compare={"to": "msp"},
        measure=["near auroc", "near fpr95", "stop"],
        figure={"y": ["near auroc"]},
    )


def interval(value, low, high):
    return {"value": value, "low": low, "high": high}


def found(difference, *, above=True, **changes):
    entry = {
        "classifier": "ordinary",
        "of": "label scale=2",
        "value": interval(0.9, 0.88, 0.92),
        "to": "msp",
        "to_value": interval(0.85, 0.8, 0.9),
        "difference": difference,
        "verdict": verdict(difference, above=above),
        "chosen": ["label scale=2"],
    }
    return {"benchmark": "mine", "claim": [entry | changes]}


@pytest.mark.parametrize(
    ("difference", "says"),
    [
        (interval(0.05, 0.01, 0.09), "+5.0 points (+1.0 to +9.0): the claim is borne out here."),
        (
            interval(-0.05, -0.09, -0.01),
            "-5.0 points (-9.0 to -1.0): the claim is not borne out here, but its opposite.",
        ),
        (interval(0.05, -0.01, 0.11), "+5.0 points (-1.0 to +11.0): the interval includes 0, so that the claim is"),
    ],
)
def test_the_sign_of_a_difference_decides(difference, says):
    text = conclusion(make(), found(difference))
    assert text.startswith(
        "Near AUROC of `label scale=2`, chosen on validation among `label`, is 90.0 % (88.0–92.0); that of `msp` is "
        "85.0 % (80.0–90.0). The paired difference is "
    )
    assert says in text
    assert text.count(". ") == 1  # two sentences; the other dots are decimal points


def test_below_turns_it_round():
    less = interval(-0.05, -0.09, -0.01)
    study = make(measure="near fpr95", above=None, below="msp")
    assert "the claim is borne out here" in conclusion(study, found(less, above=False))
    assert "not borne out" in conclusion(make(), found(less))


def test_a_number_is_a_bound():
    values = found(interval(0.05, 0.03, 0.07), bound=0.85)
    del values["claim"][0]["to"], values["claim"][0]["to_value"]
    text = conclusion(make(above=0.85), values)
    assert text.endswith(
        "Against the 85 % of the claim that is +5.0 points (+3.0 to +7.0): the claim is borne out here."
    )


def test_differences_are_counted_by_their_whole_interval():
    intervals = [interval(0.1, 0.05, 0.15), interval(0.1, -0.05, 0.25), interval(-0.1, -0.15, -0.05), None]
    results = {"differences": [{"measures": {"near auroc": each}} for each in intervals]}
    assert difference_summary(make(), results) == (
        "Paired differences to `msp`: of 3, near AUROC is higher with its whole interval in 1, lower in 1, and neither "
        "in 1."
    )


def test_the_curve_says_who_loses_more():
    difference = {"psnr": {"near": interval(-0.8, -1.2, -0.4), "far": interval(0.5, 0.1, 0.9), "x": interval(0, -1, 1)}}
    text = curve_conclusion({"at": 4, "difference": difference})
    assert text.startswith("At level 4 the mean PSNR of InD images differs by -0.8 dB against near (-1.2 to -0.4), ")
    assert "InD images lose more than near; less than far. The paper has InD images lose more" in text


def test_a_page_keeps_the_sections_of_other_benchmarks(monkeypatch, tmp_path):
    from tasks.studies import page

    monkeypatch.setattr(page, "docs_folder", lambda: tmp_path)
    point = {"name": "msp", "line": "rows", "axes": {}, "classifier": "ordinary"}
    measures = {"near auroc": interval(0.9, 0.8, 0.95), "near fpr95": interval(0.1, 0.05, 0.2), "stop": None}
    base = {
        "study": "scales",
        "images": {"ind": 3, "near": 4},
        "limit": None,
        "classifiers": ["ordinary"],
        "seeds": [0],
        "draws": 100,
        "version": "1",
        "method_version": 4,
        "left_out": {"other": f"too small for {Path.home()}/x"},
        "points": [point | {"measures": measures}],
        "differences": [],
    }
    for name, difference in (("mine", 0.05), ("yours", -0.05), ("mine", -0.05)):
        results = base | found(interval(difference, difference, difference)) | {"benchmark": name}
        path = page.write_page(make(), results, {f"scales-{name}.png": b"png"})
    text = path.read_text()
    assert text.index("## mine") < text.index("## yours")
    assert text.count("## mine") == 1
    assert "not borne out" in section(make(), results, ["scales-mine.png"])
    assert "| `msp` | 90.0 (80.0–95.0) | 10.0 (5.0–20.0) | – |" in text
    assert "\nLeft out: other: too small for ~/x.\n" in text
    listed = index(tmp_path)
    assert listed.count("not borne out") == 2
    assert "(scales.md)" in listed
    assert (tmp_path / "scales-mine.png").read_bytes() == b"png"
