"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyeditfast.data import FORMATS

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory or hub name of a causal language model.")
]
EditsArgument = Annotated[
    Path, typer.Argument(metavar="EDITS", help="A JSON array, JSON lines or Parquet file.")
]
MethodOption = Annotated[str, typer.Option(help="ultraedit or wise.")]
FormatOption = Annotated[str, typer.Option(help=f"Record layout: {', '.join(FORMATS)}.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use only the first so many records.")]
SkipOption = Annotated[
    bool, typer.Option("--skip-bad-records", help="Pass over records that cannot be read.")
]
ChatOption = Annotated[
    bool | None,
    typer.Option(
        "--chat-template/--no-chat-template",
        help="Put prompts into the tokenizer's chat template. Default: as side memories in MODEL "
        "were trained, else without.",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    str, typer.Option(help="auto (that of the files), bfloat16, float16 or float32.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 or auto (spread out). Default: cuda if there is one."),
]
TokensOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens of one forward pass. Default: by free memory.")
]

METHODS = ("ultraedit", "wise")


def check_method(method: str) -> None:
    """Raise ``ValueError`` for a method that does not exist."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(METHODS)}")
