import pytest


@pytest.fixture(scope="module")
def measured_groups(project):
    """The study of groups with its scores, its points of the first grouping, and the score table of their row."""
    from test_axes import CLOSE, write_study

    from tasks.score.stage import score
    from tasks.studies.points import plan_study
    from tasks.studies.results import Measured

    write_study(project, CLOSE, "close")
    planned = plan_study("close", "digits")
    for key in planned.runs:
        score(planned.open(key))
    measured = Measured.of(planned)
    [(_, tables)] = measured.runs.values()
    table = tables["ordinary", "knn", 0]
    return (
        measured,
        [point for point in planned.points if point.grouping == "distance"],
        table[table["split"] == "test"],
    )
