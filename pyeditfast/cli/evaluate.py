"""``pyeditfast evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pyeditfast.cli.models import open_model, saved_chat_template
from pyeditfast.cli.options import (
    ChatOption,
    DeviceOption,
    DtypeOption,
    EditsArgument,
    FormatOption,
    LimitOption,
    ModelArgument,
    SkipOption,
    TokensOption,
)
from pyeditfast.cli.records import Records


def evaluate(
    model: ModelArgument,
    edits: EditsArgument,
    format: FormatOption = "auto",
    limit: LimitOption = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Also the share of exact greedy answers.")
    ] = False,
    chat_template: ChatOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    tokens_per_pass: TokensOption = None,
    skip_bad_records: SkipOption = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the scores to this file.")
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE.png",
            help="Draw the gaps that route prompts to side memories (WISE).",
        ),
    ] = None,
) -> None:
    """Score MODEL on EDITS: efficacy, generalization, specificity, portability.

    For a model with side memories (WISE) also which prompts they answer.
    """
    from pyeditfast.evaluation import evaluate as evaluate_model
    from pyeditfast.model.wise_linear import find_wise_linear
    from pyeditfast.routing_plot import draw_routing

    _check_places(json_file, plot_file)
    records = Records(edits, format, limit, skip_bad_records).read()
    loaded, tokenizer = open_model(model, dtype, device)
    if chat_template is None:
        chat_template = saved_chat_template(Path(model).expanduser())
        if chat_template:
            print("prompts are put into the chat template, as those of the edits were")
    if plot_file is not None:
        routed = find_wise_linear(loaded)
        if routed is None or not routed.side_weights:
            raise ValueError(f"--plot draws the gaps of side memories; {model} has none")
    scores = evaluate_model(
        loaded,
        tokenizer,
        records,
        exact=exact,
        chat_template=chat_template,
        tokens_per_pass=tokens_per_pass,
        progress=True,
    )
    print(scores)
    if scores.skipped:
        print(f"{scores.skipped} prompts were skipped: empty, or longer than the model's context")
    if json_file is not None:
        json_file.write_text(json.dumps(scores.to_dict(), indent=2) + "\n")
    if plot_file is not None:
        if scores.routing is None:
            raise ValueError(f"--plot: {edits} holds nothing to score")
        draw_routing(scores.routing, plot_file)
        print(f"drawn in {plot_file}")


def _check_places(json_file: Path | None, plot_file: Path | None) -> None:
    """Refuse what could not be written before any work."""
    for option, file in (("--json", json_file), ("--plot", plot_file)):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{option} {file}: there is no directory {file.parent}")
    if plot_file is not None:
        from pyeditfast.routing_plot import require_matplotlib

        if plot_file.suffix.lower() != ".png":
            raise ValueError(f"--plot {plot_file}: the picture is a PNG; end its name in .png")
        require_matplotlib()
