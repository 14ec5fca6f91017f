"""Where things are, and the environment in which steps run: nothing has to be installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

BUILD = REPOSITORY / "build" / "gpu"
"""Logs, rows and links of a run; not in version control."""

RESULTS = REPOSITORY / "bench" / "results"

PACKAGES = {
    "pyeditfast": "pyeditfast",
    "pyeditfast_kernels": "kernels",
    "pyeditfast_published": "bench/published",
}
"""Import names and the folders that they are in a checkout."""


def link_packages(folder: Path) -> Path:
    """Make ``folder`` hold one link a package, so that it can be put on ``PYTHONPATH``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in PACKAGES.items():
        link, target = folder / name, REPOSITORY / source
        if link.is_symlink() and link.resolve() == target.resolve():
            continue
        if link.is_symlink() or link.exists():
            link.unlink()
        link.symlink_to(target, target_is_directory=True)
    return folder


def step_environment(device: str, build: Path = BUILD) -> dict[str, str]:
    """Return the environment of a step: this one, with the packages and the tests' helpers.

    On the CPU the kernels run in Triton's interpreter.
    """
    environment = dict(os.environ)
    paths = [str(link_packages(build / "path")), str(REPOSITORY / "tests")]
    if environment.get("PYTHONPATH"):
        paths.append(environment["PYTHONPATH"])
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment["PYTHONUNBUFFERED"] = "1"
    environment.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    return environment


def commit() -> str:
    """Return the commit of the working tree, marked where it has changes; unknown without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
