"""What holds for every test: no property of Hypothesis has a deadline, for machines are busy; and the files' order."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

FIRST = ("test_methods", "test_pipeline")
"""They take longest: so two processes, each of which takes file after file, end at about the same time."""
LAST = ("test_engines",)
"""vLLM in the tests' own process sets threads, generators and torch.distributed for all that follows, and stays."""


def pytest_collection_modifyitems(items):
    """Put the files in their order."""
    items.sort(key=lambda item: (item.path.stem not in FIRST, item.path.stem in LAST))
