"""What holds for every test: no property is a matter of time, for machines are busy; the longest files come first."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

LONGEST = ("test_methods", "test_pipeline")


def pytest_collection_modifyitems(items):
    """Let two processes, each of which takes file after file, end at about the same time."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)
