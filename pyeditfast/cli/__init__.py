"""The command line: ``pyeditfast edit``, ``evaluate``, ``demo`` and ``info``."""

from __future__ import annotations

import logging
import os
import signal
import sys

import typer

from pyeditfast.cli import demo, edit, evaluate, info
from pyeditfast.errors import PyEditFastError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Edit facts in causal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(edit.edit)
app.command()(evaluate.evaluate)
app.command()(demo.demo)
app.command()(info.info)


def main() -> None:
    """Run the command line; errors that a user can act on are printed without a traceback."""
    # A polite kill stops at a whole turn and saves, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except (PyEditFastError, ValueError, OSError, ImportError) as error:
        if os.environ.get("PYEDITFAST_TRACEBACK"):
            raise
        print(f"pyeditfast: {error}", file=sys.stderr)
        raise SystemExit(2) from None
