"""``pyeditfast edit``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import typer

from pyeditfast.cli.edit_run import (
    check_places,
    edited_modules,
    memories_told,
    new_editor,
    resumed_editor,
    score,
    write_report,
)
from pyeditfast.cli.edit_settings import edit_settings
from pyeditfast.cli.options import (
    DeviceOption,
    DtypeOption,
    EditsArgument,
    FormatOption,
    LimitOption,
    MethodOption,
    ModelArgument,
    SkipOption,
)
from pyeditfast.cli.records import Records

ULTRAEDIT, WISE = "UltraEdit", "WISE"
"""The panels of the help text that a method's own options stand in."""


def edit(
    model: ModelArgument,
    edits: EditsArgument,
    out: Annotated[
        Path, typer.Option(help="Directory for the edited model, or WISE's side memories.")
    ],
    method: MethodOption = "ultraedit",
    format: FormatOption = "auto",
    limit: LimitOption = None,
    preset: Annotated[
        str | None, typer.Option(help="Settings of a known model, e.g. mistral-7b.")
    ] = None,
    module: Annotated[
        list[str] | None,
        typer.Option(help="A module to edit; UltraEdit takes more, repeat for them."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of stochastic rounding, or of WISE's masks and templates [0]."),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a rejected edit.")] = False,
    skip_bad_records: SkipOption = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run (model, settings) stopped in --out."),
    ] = False,
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Write the report, all rejections in it, here.")
    ] = None,
    score_model: Annotated[
        bool, typer.Option("--score", help="Score the model on the edits, before and after.")
    ] = False,
    lr: Annotated[
        float | None, typer.Option(help="Scale of the values [1e-6].", rich_help_panel=ULTRAEDIT)
    ] = None,
    turn_size: Annotated[
        int | None, typer.Option(help="Edits a turn [100].", rich_help_panel=ULTRAEDIT)
    ] = None,
    ridge: Annotated[
        float | None, typer.Option(help="Ridge λ [1].", rich_help_panel=ULTRAEDIT)
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(help="Edits that share one mean in the loss [10].", rich_help_panel=ULTRAEDIT),
    ] = None,
    variance: Annotated[
        str | None, typer.Option(help="unbiased or published.", rich_help_panel=ULTRAEDIT)
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="auto, dual or primal.", rich_help_panel=ULTRAEDIT)
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(help="nearest, stochastic or compensated.", rich_help_panel=ULTRAEDIT),
    ] = None,
    tokens_per_pass: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of one forward pass. Default: by free memory.",
            rich_help_panel=ULTRAEDIT,
        ),
    ] = None,
    n_iter: Annotated[
        int | None, typer.Option(help="Steps an edit, at most [70].", rich_help_panel=WISE)
    ] = None,
    edit_lr: Annotated[
        float | None, typer.Option(help="Length of a step [1].", rich_help_panel=WISE)
    ] = None,
    mask_ratio: Annotated[
        float | None,
        typer.Option(
            help="Part of the weight that a shard may change [0.2].", rich_help_panel=WISE
        ),
    ] = None,
    act_margin: Annotated[
        tuple[float, float, float] | None,
        typer.Option(
            help="Largest gap of unrelated prompts, smallest of edits, and their distance "
            "[5 20 10].",
            rich_help_panel=WISE,
        ),
    ] = None,
    act_ratio: Annotated[
        float | None,
        typer.Option(
            help="Threshold over the smallest gap of an edit [0.88].", rich_help_panel=WISE
        ),
    ] = None,
    norm_constraint: Annotated[
        str | None,
        typer.Option(
            help="Largest change of an element, or none for any [1].", rich_help_panel=WISE
        ),
    ] = None,
    save_freq: Annotated[
        int | None, typer.Option(help="Edits a shard [500].", rich_help_panel=WISE)
    ] = None,
    merge_freq: Annotated[
        int | None, typer.Option(help="Edits between merges [1000].", rich_help_panel=WISE)
    ] = None,
    merge_alg: Annotated[
        str | None,
        typer.Option(
            help="ties, linear, slerp, magnitude, magnitude_norm, sign, dare_linear or dare_ties.",
            rich_help_panel=WISE,
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Part that a merge keeps [0.53].", rich_help_panel=WISE)
    ] = None,
    no_retrieve: Annotated[
        bool,
        typer.Option(
            "--no-retrieve",
            help="One side memory, not one a merge (WISE-Merge).",
            rich_help_panel=WISE,
        ),
    ] = False,
    replay: Annotated[
        bool, typer.Option("--replay", help="Train on past edits too.", rich_help_panel=WISE)
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Set thresholds between the gaps of edits and of locality prompts.",
            rich_help_panel=WISE,
        ),
    ] = False,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="A context with {} for the prompt; repeat for more. Default: {} and ten that the "
            "model writes.",
            rich_help_panel=WISE,
        ),
    ] = None,
    locality_prompts: Annotated[
        Path | None,
        typer.Option(
            help="Unrelated prompts, one a line, for edits without one.", rich_help_panel=WISE
        ),
    ] = None,
    chat_template: Annotated[
        bool,
        typer.Option(
            "--chat-template",
            help="Put prompts into the tokenizer's chat template.",
            rich_help_panel=WISE,
        ),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Edits trained together [1].", rich_help_panel=WISE)
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            help="Of the gaps: model (its own), silu, gelu, gelu_tanh, relu or none.",
            rich_help_panel=WISE,
        ),
    ] = None,
    reduction: Annotated[
        str | None,
        typer.Option(help="Of a prompt's gaps: auto, mean or max.", rich_help_panel=WISE),
    ] = None,
    quirks: Annotated[
        str | None,
        typer.Option(help="none, or published for the published losses.", rich_help_panel=WISE),
    ] = None,
) -> None:
    """Edit facts into MODEL with UltraEdit or WISE and save the result."""
    from pyeditfast.editors import EditReport

    own: dict[str, dict[str, Any]] = {
        "ultraedit": {
            "lr": lr,
            "turn_size": turn_size,
            "ridge": ridge,
            "micro_batch": micro_batch,
            "variance": variance,
            "form": form,
            "rounding": rounding,
            "tokens_per_pass": tokens_per_pass,
        },
        "wise": {
            "n_iter": n_iter,
            "edit_lr": edit_lr,
            "mask_ratio": mask_ratio,
            "act_margin": act_margin,
            "act_ratio": act_ratio,
            "norm_constraint": norm_constraint,
            "save_freq": save_freq,
            "merge_freq": merge_freq,
            "merge_alg": merge_alg,
            "density": density,
            "retrieve": False if no_retrieve else None,
            "replay": replay or None,
            "calibrate": calibrate or None,
            "templates": tuple(template) if template else None,
            "locality_prompts": locality_prompts,
            "chat_template": chat_template or None,
            "batch_size": batch_size,
            "activation": activation,
            "reduction": reduction,
            "quirks": quirks,
        },
    }
    config, named = edit_settings(method, preset, module, seed, own)
    check_places(model, out, report_file, resume)
    records = Records(edits, format, limit, skip_bad_records)
    total = records.count()
    if resume:
        editor = resumed_editor(out, model, config, named, dtype, device)
        print(
            f"{out} holds {editor.edits} edits from {editor.records} records; going on from there"
        )
    else:
        editor = new_editor(model, config, dtype, device)
    print(f"editing {edited_modules(editor.config)}")
    first, before = editor.records, editor.edits
    if score_model and not resume:
        print(f"before: {score(editor, records)}")
    report = EditReport()
    try:
        editor.edit(
            itertools.islice(records.read(), first, None),
            strict=strict,
            progress=True,
            total=max(0, total - first),
            report=report,
        )
    except BaseException as error:
        # Hours of edits may be done: whatever stopped the run, they are kept.
        if editor.edits > before:
            print(f"\nstopped; saving the {editor.edits} edits made so far")
            editor.save(out)
            print(f"saved to {out}; go on with the same command and --resume")
        write_report(report, first, report_file)
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(130) from None
        raise
    editor.save(out)
    write_report(report, first, report_file)
    print(report)
    for line in memories_told(editor):
        print(line)
    print(f"saved to {out}")
    if score_model:
        print(f"after:  {score(editor, records)}")
