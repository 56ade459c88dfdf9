import pytest
from small_studies import CLOSE, write_study


@pytest.fixture(scope="module")
def measured_groups(project):
    """The study of groups with its scores, its points of the first grouping, and the score table of their row."""
    from tasks.studies.points import plan_study
    from tasks.studies.results import Measured
    from tasks.studies.stage import make_scores

    write_study(project, CLOSE, "close")
    planned = plan_study("close", "digits")
    make_scores(planned)
    measured = Measured.of(planned)
    [(_, tables)] = measured.runs.values()
    table = tables["ordinary", "knn", 0]
    return (
        measured,
        [point for point in planned.points if point.grouping == "distance"],
        table[table["split"] == "test"],
    )
