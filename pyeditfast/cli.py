"""The command line: ``pyeditfast edit``, ``evaluate``, ``demo`` and ``info``."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyeditfast.data import FORMATS, Edit, load_edits
from pyeditfast.errors import PyEditFastError, RecordError

if TYPE_CHECKING:
    from pyeditfast.editors import UltraEditConfig, UltraEditor

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
    variance: Annotated[str | None, typer.Option(help="unbiased or published.")] = None,
    rounding: Annotated[
        str | None, typer.Option(help="nearest, stochastic or compensated.")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    tokens_per_pass: TokensOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a rejected edit.")] = False,
    skip_bad_records: SkipOption = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that was stopped in --out.")
    ] = False,
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Write the report, all rejections in it, here.")
    ] = None,
    score: Annotated[
        bool, typer.Option("--score", help="Score the model on the edits, before and after.")
    ] = False,
) -> None:
    """Edit facts into MODEL with UltraEdit and save the result."""
    from pyeditfast.evaluation import evaluate as evaluate_model

    total = _count(edits, format, limit, skip_bad_records)
    changes = {
        "lr": lr,
        "turn_size": turn_size,
        "ridge": ridge,
        "variance": variance,
        "rounding": rounding,
        "tokens_per_pass": tokens_per_pass,
        "edit_modules": module or None,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    if resume:
        editor = _resumed(out, given, preset, device, tokens_per_pass)
        print(
            f"{out} holds {editor.edits} edits from {editor.records} records; going on from there"
        )
    else:
        if (out / "pyeditfast.json").exists():
            raise ValueError(f"{out} holds an edited model; use --resume or another --out")
        editor = _new_editor(model, _config(preset, given), dtype, device)
    print(f"editing {', '.join(editor.config.edit_modules or ())}")
    first = editor.records
    records = itertools.islice(_records(edits, format, limit, skip_bad_records), first, None)
    if score and not resume:
        sample = _records(edits, format, limit, skip_bad_records)
        print(f"before: {evaluate_model(editor.model, editor.tokenizer, sample)}")
    try:
        report = editor.edit(records, strict=strict, progress=True, total=max(0, total - first))
    except KeyboardInterrupt:
        print(f"\nstopped; saving the {editor.edits} edits of {editor.turns} whole turns to {out}")
        editor.save(out)
        print("go on with the same command and --resume")
        raise SystemExit(130) from None
    report.rejected = [
        dataclasses.replace(rejection, index=rejection.index + first)
        for rejection in report.rejected
    ]
    print(report)
    if report_file is not None:
        report_file.write_text(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")
    if score:
        sample = _records(edits, format, limit, skip_bad_records)
        print(f"after:  {evaluate_model(editor.model, editor.tokenizer, sample)}")
    editor.save(out)
    print(f"saved to {out}")


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
    out: Path,
    given: dict[str, Any],
    preset: str | None,
    device: str | None,
    tokens_per_pass: int | None,
) -> UltraEditor:
    from pyeditfast.editors import UltraEditor

    fixed = sorted(set(given) - {"tokens_per_pass"}) + (["preset"] if preset else [])
    editor = UltraEditor.load(out, device=_device(device), tokens_per_pass=tokens_per_pass)
    saved = editor.config.to_dict()
    changed = [name for name in fixed if name == "preset" or given[name] != saved[name]]
    if changed:
        raise ValueError(
            f"--resume goes on with the settings of the stopped run; leave out {', '.join(changed)}"
        )
    return editor


def _load(source: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    import torch

    from pyeditfast.checkpoints import load_model

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
