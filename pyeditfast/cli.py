"""The command line: ``pyeditfast edit``, ``evaluate``, ``demo`` and ``info``."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyeditfast.data import FORMATS, Edit, load_edits
from pyeditfast.errors import PyEditFastError, RecordError

if TYPE_CHECKING:
    from pyeditfast.editors import EditReport, UltraEditConfig, UltraEditor
    from pyeditfast.evaluation import Scores

app = typer.Typer(
    help="Edit facts in causal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory or hub name of a causal language model.")
]
EditsArgument = Annotated[
    Path, typer.Argument(metavar="EDITS", help="A JSON array, JSON lines or Parquet file.")
]
FormatOption = Annotated[str, typer.Option(help=f"Record layout: {', '.join(FORMATS)}.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use only the first so many records.")]
SkipOption = Annotated[
    bool, typer.Option("--skip-bad-records", help="Pass over records that cannot be read.")
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


@app.command()
def edit(
    model: ModelArgument,
    edits: EditsArgument,
    out: Annotated[Path, typer.Option(help="Directory for the edited model.")],
    format: FormatOption = "auto",
    limit: LimitOption = None,
    preset: Annotated[
        str | None, typer.Option(help="Settings of a known model, e.g. mistral-7b.")
    ] = None,
    module: Annotated[
        list[str] | None, typer.Option(help="A module to edit; repeat for more.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Scale of the values [1e-6].")] = None,
    turn_size: Annotated[int | None, typer.Option(help="Edits a turn [100].")] = None,
    ridge: Annotated[float | None, typer.Option(help="Ridge λ [1].")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Edits that share one mean in the loss [10].")
    ] = None,
    variance: Annotated[str | None, typer.Option(help="unbiased or published.")] = None,
    form: Annotated[str | None, typer.Option(help="auto, dual or primal.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of stochastic rounding [0].")] = None,
    rounding: Annotated[
        str | None, typer.Option(help="nearest, stochastic or compensated.")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    tokens_per_pass: TokensOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a rejected edit.")] = False,
    skip_bad_records: SkipOption = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run (model, settings) stopped in --out."),
    ] = False,
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Write the report, all rejections in it, here.")
    ] = None,
    score: Annotated[
        bool, typer.Option("--score", help="Score the model on the edits, before and after.")
    ] = False,
) -> None:
    """Edit facts into MODEL with UltraEdit and save the result."""
    from pyeditfast.editors import EditReport

    changes = {
        "lr": lr,
        "turn_size": turn_size,
        "micro_batch": micro_batch,
        "ridge": ridge,
        "variance": variance,
        "form": form,
        "rounding": rounding,
        "seed": seed,
        "tokens_per_pass": tokens_per_pass,
        "edit_modules": tuple(module) if module else None,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    config = _config(preset, given)
    _check_places(model, out, report_file, resume)
    total = _count(edits, format, limit, skip_bad_records)
    if resume:
        editor = _resumed(out, config, {*given, *(["edit_modules"] if preset else [])}, device)
        print(
            f"{out} holds {editor.edits} edits from {editor.records} records; going on from there"
        )
    else:
        editor = _new_editor(model, config, dtype, device)
    print(f"editing {', '.join(editor.config.edit_modules or ())}")
    first, turns = editor.records, editor.turns
    records = itertools.islice(_records(edits, format, limit, skip_bad_records), first, None)
    if score and not resume:
        print(f"before: {_score(editor, edits, format, limit)}")
    report = EditReport()
    try:
        editor.edit(
            records, strict=strict, progress=True, total=max(0, total - first), report=report
        )
    except BaseException as error:
        # Hours of turns may be done: whatever stopped the run, they are kept.
        if editor.turns > turns:
            print(f"\nstopped; saving the {editor.edits} edits of {editor.turns} whole turns")
            editor.save(out)
            print(f"saved to {out}; go on with the same command and --resume")
        _write_report(report, first, report_file)
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(130) from None
        raise
    editor.save(out)
    _write_report(report, first, report_file)
    print(report)
    print(f"saved to {out}")
    if score:
        print(f"after:  {_score(editor, edits, format, limit)}")


@app.command()
def evaluate(
    model: ModelArgument,
    edits: EditsArgument,
    format: FormatOption = "auto",
    limit: LimitOption = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Also the share of exact greedy answers.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    tokens_per_pass: TokensOption = None,
    skip_bad_records: SkipOption = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the scores to this file.")
    ] = None,
) -> None:
    """Score MODEL on EDITS: efficacy, generalization, specificity, portability."""
    from pyeditfast.evaluation import evaluate as evaluate_model

    records = _records(edits, format, limit, skip_bad_records)
    loaded, tokenizer = _load(model, dtype, device)
    scores = evaluate_model(
        loaded, tokenizer, records, exact=exact, tokens_per_pass=tokens_per_pass, progress=True
    )
    print(scores)
    if scores.skipped:
        print(f"{scores.skipped} prompts were skipped: empty, or longer than the model's context")
    if json_file is not None:
        json_file.write_text(json.dumps(scores.to_dict(), indent=2) + "\n")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for report, picture and model.")] = Path(
        "build/demo"
    ),
    facts: Annotated[int, typer.Option(min=1, help="Facts to edit.")] = 100,
    turn_size: Annotated[int, typer.Option(min=1, help="Edits a turn.")] = 25,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the world and the model.")] = 0,
) -> None:
    """Train a small model on a made-up world, edit facts in it, and compare; no download."""
    from pyeditfast.demo.run import run_demo

    print(run_demo(out, facts=facts, turn_size=turn_size, seed=seed))


@app.command()
def info() -> None:
    """Show versions, devices, and which backend each op takes and why."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from pyeditfast.backends import chosen_backends
    from pyeditfast.extension import extension_status

    print(f"python       {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("pyeditfast", "torch", "triton", "transformers", "numpy", "safetensors"):
        try:
            print(f"{name:<12} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<12} not installed")
    print(f"extension    {extension_status()}")
    print(
        f"cpu          {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        print(f"cuda:{index:<7} {card.name}, {card.total_memory / 2**30:.0f} GiB")
        devices.append(torch.device("cuda", index))
    if len(devices) == 1:
        print("cuda         none found")
    for device in devices:
        print(f"\nops on {device}")
        for choice in chosen_backends(device):
            print(f"  {choice.op:<16} {choice.backend:<10} {choice.reason}")


def _records(path: Path, format: str, limit: int | None, skip: bool) -> Iterator[Edit]:
    def tell(error: RecordError) -> None:
        print(f"skipped: {error}", file=sys.stderr)

    stream = load_edits(
        path, format, on_error="skip" if skip else "raise", report=tell if skip else None
    )
    return itertools.islice(stream, limit)


def _count(path: Path, format: str, limit: int | None, skip: bool) -> int:
    """Read the records once, so that a bad one shows before the first edit and not hours later."""
    if skip:
        stream = load_edits(path, format, on_error="skip", report=lambda error: None)
    else:
        stream = load_edits(path, format)
    total = sum(1 for _ in itertools.islice(stream, limit))
    if total == 0:
        raise ValueError(f"{path} holds no usable record")
    print(f"{total} records in {path}")
    return total


def _config(preset: str | None, given: dict[str, Any]) -> UltraEditConfig:
    from pyeditfast.editors import UltraEditConfig

    if preset is not None:
        return UltraEditConfig.preset(preset, **given)
    return UltraEditConfig(**given)


def _new_editor(
    source: str, config: UltraEditConfig, dtype: str, device: str | None
) -> UltraEditor:
    from pyeditfast.editors import UltraEditor

    model, tokenizer = _load(source, dtype, device)
    return UltraEditor(model, tokenizer, config)


def _resumed(
    out: Path, config: UltraEditConfig, named: set[str], device: str | None
) -> UltraEditor:
    """Return the editor saved in ``out``; the settings ``named`` must be those that it has."""
    from pyeditfast.editors import UltraEditor

    editor = UltraEditor.load(out, device=_device(device), tokens_per_pass=config.tokens_per_pass)
    changed = sorted(
        name
        for name in named - {"tokens_per_pass"}
        if getattr(config, name) != getattr(editor.config, name)
    )
    if changed:
        raise ValueError(
            f"--resume goes on with the settings of the stopped run; {', '.join(changed)} differ"
        )
    return editor


def _check_places(model: str, out: Path, report_file: Path | None, resume: bool) -> None:
    """Refuse what could not be written, or would write over something, before any work."""
    if report_file is not None and not report_file.absolute().parent.is_dir():
        raise ValueError(f"--report {report_file}: there is no directory {report_file.parent}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; a directory is needed")
    if not resume and (out / "config.json").exists():
        what = "an edited model" if (out / "pyeditfast.json").exists() else "a model"
        raise ValueError(f"{out} holds {what}; use --resume or another --out")
    if not resume and Path(model).is_dir() and out.resolve() == Path(model).resolve():
        raise ValueError(f"--out {out} is the model itself; name another directory")
    if not resume:
        out.mkdir(parents=True, exist_ok=True)
    if not os.access(out if out.exists() else out.absolute().parent, os.W_OK):
        raise ValueError(f"--out {out} cannot be written")


def _write_report(report: EditReport, first: int, report_file: Path | None) -> None:
    """Number the rejections as the file does, and write the report if it is wanted."""
    report.rejected = [
        dataclasses.replace(rejection, index=rejection.index + first)
        for rejection in report.rejected
    ]
    if report_file is not None:
        report_file.write_text(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")


def _score(editor: UltraEditor, edits: Path, format: str, limit: int | None) -> Scores:
    from pyeditfast.evaluation import evaluate as evaluate_model

    stream = load_edits(edits, format, on_error="skip", report=lambda error: None)
    return evaluate_model(editor.model, editor.tokenizer, itertools.islice(stream, limit))


def _load(source: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    import torch

    from pyeditfast.loading import load_model

    path = Path(source).expanduser()
    if not path.is_dir() and (
        path.exists() or source.startswith((".", "/", "~")) or path.parts[2:]
    ):
        raise ValueError(f"{source} is not a directory with a model")
    dtypes: dict[str, torch.dtype | str] = {
        "auto": "auto",
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32": torch.float32,
    }
    if dtype not in dtypes:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(dtypes)}")
    return load_model(
        path if path.is_dir() else source, dtype=dtypes[dtype], device=_device(device)
    )


def _device(device: str | None) -> str | None:
    import torch

    if device is not None:
        return device
    return "cuda" if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
