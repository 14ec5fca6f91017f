"""``pyeditfast demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyeditfast.cli.options import MethodOption, check_method

TURN_SIZE = 25


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for report, picture and model. [build/demo, for wise build/demo-wise]"
        ),
    ] = None,
    method: MethodOption = "ultraedit",
    facts: Annotated[int, typer.Option(min=1, help="Facts to edit.")] = 100,
    turn_size: Annotated[
        int | None, typer.Option(min=1, help=f"Edits a turn of UltraEdit [{TURN_SIZE}].")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the world and the model.")] = 0,
) -> None:
    """Train a small model on a made-up world, edit facts in it, and compare; no download."""
    check_method(method)
    if method == "wise":
        if turn_size is not None:
            raise ValueError("--turn-size belongs to --method ultraedit")
        from pyeditfast.demo.wise_run import run_wise_demo

        print(run_wise_demo(out or Path("build/demo-wise"), facts=facts, seed=seed))
        return
    from pyeditfast.demo.run import run_demo

    print(
        run_demo(
            out or Path("build/demo"), facts=facts, turn_size=turn_size or TURN_SIZE, seed=seed
        )
    )
