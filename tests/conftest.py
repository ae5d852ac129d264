import importlib


def pytest_configure(config):
    """A process that only hands out tests to others needs neither torch nor fixtures, and they wait for it."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.register(importlib.import_module("tests.fixtures"))
