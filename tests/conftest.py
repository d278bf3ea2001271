"""Which tests are run. What they share is in shared.py."""

import pytest

SKIPPED = "stagewise/skipped"


def pytest_addoption(parser):
    """`--slow` runs what takes a second and a half and more, too."""
    parser.addoption("--slow", action="store_true", help="run the slow tests too (make test-all)")
    parser.addoption("--rest", action="store_true", help="run what the last run skipped, and slow")


def pytest_configure(config):
    """The process that hands tests out to others (-n) need not import what these need."""
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared")


def pytest_collection_modifyitems(config, items):
    """Skips slow tests by name, so that it is said that they were not run."""
    if config.getoption("--rest"):
        skipped = config.cache.get(SKIPPED, None)
        if skipped is None:
            raise pytest.UsageError("No run before this one has said what it skipped: make test")
        chosen = [item.nodeid in skipped or item.parent.nodeid in skipped for item in items]
        config.hook.pytest_deselected(
            items=[i for i, c in zip(items, chosen, strict=True) if not c]
        )
        items[:] = [item for item, taken in zip(items, chosen, strict=True) if taken]
    elif not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: make test-all"))


def pytest_terminal_summary(terminalreporter, config):
    """Keeps what was skipped for `--rest`: slow tests, and those of what was not installed."""
    skipped = terminalreporter.stats.get("skipped", [])
    listed = config.getoption("--rest") or config.getoption("--collect-only")
    if not listed and hasattr(config, "cache"):  # -p no:cacheprovider
        config.cache.set(SKIPPED, sorted({report.nodeid for report in skipped}))
