import pytest
from small_project import make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project folder with prepared images and models of seed 0."""
    patch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("project")
    make_project(patch, root)
    yield root
    patch.undo()
