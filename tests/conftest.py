"""The order of all tests: a module of flows takes minutes by itself, and must not be the last one at work."""


def pytest_collection_modifyitems(items):
    first = ("tests/flows/", "tests/experiments/")
    items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in first])
