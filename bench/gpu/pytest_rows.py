"""A pytest plugin that reports every test as a row, so that a killed run tells what it did."""

from __future__ import annotations

import re

import pytest

from bench.gpu.rows import emit

_MISSING = re.compile(r"No module named '(?!pyeditfast|bench)([\w.]+)'")


def pytest_configure(config: pytest.Config) -> None:
    """Know the markers of plugins that need not be installed."""
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, not installed")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Report a file that cannot be imported; one that lacks a package is not available."""
    if not report.failed:
        return
    text = report.longreprtext
    missing = _MISSING.search(text)
    if missing:
        emit("test", case=report.nodeid, status="not available", detail=f"needs {missing[1]}")
    else:
        emit("test", case=report.nodeid, status="failed", detail=last_line(text))


def pytest_runtest_logstart(nodeid: str) -> None:
    """Note which test is running."""
    emit("begin", case=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Report a test once: its call, or the setup or teardown that failed."""
    if report.failed:
        emit("test", case=report.nodeid, status="failed", detail=last_line(report.longreprtext))
    elif report.skipped:
        emit("test", case=report.nodeid, status="skipped", detail=last_line(report.longreprtext))
    elif report.when == "call":
        emit("test", case=report.nodeid, status="passed", detail="")


def last_line(text: str) -> str:
    """Return the error of a traceback: its first ``E`` line, or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (errors or lines[-1:] or [""])[0][:300]
