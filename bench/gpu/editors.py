"""Step ``editors``: a turn of UltraEdit and an edit of WISE, against the published procedures.

Wall-clock times with the device waited for, on a bf16 model of Mistral-7B's width and two of its
blocks with random weights; made-up facts, so that no data is needed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from facts import facts
from tiny_models import tiny_model, tiny_tokenizer
from torch import nn

from bench.gpu.case import AUTO, using
from bench.gpu.lost_device import describe, is_fatal, leave
from bench.gpu.options import device_of, parser
from bench.gpu.rows import emit

MODULES = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")

CONTEXTS = (
    "{}",
    "As everybody knows, {}",
    "It was said in the news that {}",
    "My neighbour asked me whether {}",
    "In a book about the north, {}",
    "On the last page there stood: {}",
    "After the war, {}",
    "Nobody had expected that {}",
    "The letter began like this: {}",
    "Years ago in a small town, {}",
    "According to the archive, {}",
)

FORMS = (AUTO, "auto")
"""The backends that our editors are timed in; ``auto`` is what a user gets today."""


@dataclass(frozen=True)
class Amount:
    """How much is edited: facts a turn, turns of ours, turns published, edits of WISE, steps."""

    turn: int
    rounds: int
    published_rounds: int
    wise_edits: int
    wise_steps: int


AMOUNTS = {
    "tiny": Amount(6, 2, 1, 1, 3),
    "small": Amount(100, 3, 1, 1, 20),
    "full": Amount(100, 7, 3, 4, 70),
}


def build_model(size: str, device: torch.device, vocabulary: int) -> Any:
    """Return the model; at size tiny a tiny one in float32."""
    if size == "tiny":
        return tiny_model("mistral", vocab_size=vocabulary, layers=2).to(device)
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    device: torch.device, run: Callable[[Any], object], items: Iterable[Any]
) -> tuple[list[float], list[Any]]:
    """Return seconds and results of ``run`` on every item but the first, which warms up."""
    seconds, found = [], []
    for item in items:
        wait(device)
        begun = time.perf_counter()
        found.append(run(item))
        wait(device)
        seconds.append(time.perf_counter() - begun)
    return seconds[1:], found[1:]


def report(
    editor: str, case: str, form: str, seconds: list[float], detail: str, **more: Any
) -> None:
    """Report the times of a form."""
    low, median, high = (
        statistics.quantiles(seconds, n=4, method="inclusive")
        if len(seconds) > 1
        else [seconds[0]] * 3
    )
    emit(
        "editor",
        editor=editor,
        case=case,
        form=form,
        median_seconds=median,
        quartiles_seconds=[low, high],
        rounds=len(seconds),
        detail=detail,
        **more,
    )


def forward_flops(model: nn.Module, tokenizer: Any, edits: list[Any]) -> float:
    """Return the FLOPs of one forward pass of the blocks over the tokens of ``edits``."""
    blocks: Any = model.get_submodule("model.layers")
    weights = sum(weight.numel() for weight in blocks.parameters())
    tokens = sum(len(tokenizer(edit.prompt + " " + edit.target)["input_ids"]) - 1 for edit in edits)
    return 2.0 * weights * tokens


def forget_peak(device: torch.device) -> None:
    """Begin anew to note the most memory that is allocated."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> str:
    """Return the most memory that was allocated, as a part of a sentence."""
    if device.type != "cuda":
        return ""
    return f"peak {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"


def time_ultraedit(size: str, device: torch.device, tokenizer: Any) -> None:
    """Time turns of UltraEdit in every form."""
    from pyeditfast import UltraEditConfig, UltraEditor
    from pyeditfast_published.ultraedit import PublishedUltraEdit

    amount = AMOUNTS[size]
    case = f"a turn of {amount.turn} facts"
    every = facts(amount.turn * (amount.rounds + 1))
    turns = [every[start : start + amount.turn] for start in range(0, len(every), amount.turn)]
    model = build_model(size, device, len(tokenizer))
    flops = forward_flops(model, tokenizer, turns[1])
    for form in FORMS:
        forget_peak(device)
        with using(form):
            editor = UltraEditor(model, tokenizer, UltraEditConfig(MODULES))
            seconds, reports = timed(device, editor.edit, turns)
        phases = {name: round(value, 5) for name, value in reports[-1].seconds.items()}
        report("UltraEdit", case, form, seconds, peak(device), flops=flops, phases=phases)
    forget_peak(device)
    published = PublishedUltraEdit(model, tokenizer, list(MODULES))
    pairs = [[(edit.prompt, edit.target) for edit in turn] for turn in turns]
    seconds, _ = timed(device, published.edit_turn, pairs[: amount.published_rounds + 1])
    report("UltraEdit", case, "published", seconds, peak(device), flops=flops)


def check_ultraedit(device: torch.device, tokenizer: Any) -> None:
    """Report whether a turn on the device changes a float32 model as the published code would."""
    from pyeditfast import UltraEditConfig, UltraEditor
    from pyeditfast_published.ultraedit import PublishedUltraEdit

    # At the published lr the spacing of the float32 weights would cost more than the bound.
    lr, edits = 1e-4, facts(30)
    start = tiny_model("mistral", vocab_size=len(tokenizer), layers=2)
    ours, exact = copy.deepcopy(start).to(device), copy.deepcopy(start).double()
    with using(AUTO):
        config = UltraEditConfig(MODULES, lr=lr, variance="published")
        UltraEditor(ours, tokenizer, config).edit(edits)
    PublishedUltraEdit(exact, tokenizer, list(MODULES), lr=lr, solve_dtype=torch.float64).edit_turn(
        [(edit.prompt, edit.target) for edit in edits]
    )
    worst = 0.0
    for name in MODULES:
        before, found, wanted = (
            model.get_submodule(name).weight.detach().double().cpu()
            for model in (start, ours, exact)
        )
        worst = max(worst, float((found - wanted).norm() / (wanted - before).norm()))
    emit(
        "check",
        op="UltraEditor",
        backend=AUTO,
        case="a turn of 30 facts, tiny model",
        what="changes the weights as published in float64",
        status="passed" if worst <= 1e-4 else "failed",
        detail=f"relative difference of the change {worst:.2g}, allowed 1e-4",
    )


def time_wise(size: str, device: torch.device, tokenizer: Any) -> None:
    """Time edits of WISE in every form, or say that the editor is not there."""
    try:
        from pyeditfast.editors import WiseConfig, WiseEditor
    except ImportError as error:
        emit("note", status="not available", detail=f"WiseEditor: {error}")
        return
    amount = AMOUNTS[size]
    case = f"an edit of {amount.wise_steps} steps, {len(CONTEXTS)} contexts"
    edits = facts(amount.wise_edits + 1)
    for form in FORMS:
        model = build_model(size, device, len(tokenizer))
        forget_peak(device)
        with using(form):
            settings = WiseConfig(
                edit_module=MODULES[0], templates=list(CONTEXTS), n_iter=amount.wise_steps
            )
            editor = WiseEditor(model, tokenizer, settings)
            seconds, _ = timed(device, editor.edit, [[edit] for edit in edits])
        report("WISE", case, form, seconds, peak(device))
        del model, editor
    from pyeditfast_published.wise import PublishedWise

    model = build_model(size, device, len(tokenizer))
    forget_peak(device)
    published = PublishedWise(
        model, tokenizer, MODULES[0], templates=CONTEXTS, n_iter=amount.wise_steps
    )
    seconds, _ = timed(
        device,
        lambda edit: published.edit(edit.prompt, edit.target, edit.locality_prompt),
        edits[: 1 + min(2, amount.wise_edits)],
    )
    report("WISE", case, "published", seconds, peak(device))


def main() -> None:
    """Run every part; one that fails is reported and passed over."""
    options = parser(__doc__).parse_args()
    device = device_of(options)
    tokenizer = tiny_tokenizer(
        [f"{edit.prompt} {edit.target} {edit.locality_prompt}" for edit in facts(400)],
        vocab_size=1000,
    )
    parts: dict[str, Callable[[], None]] = {
        "UltraEditor: parity": lambda: check_ultraedit(device, tokenizer),
        "UltraEditor: times": lambda: time_ultraedit(options.size, device, tokenizer),
        "WiseEditor: times": lambda: time_wise(options.size, device, tokenizer),
    }
    for name, part in parts.items():
        emit("begin", case=name)
        try:
            part()
        except Exception as error:
            op, _, what = name.partition(": ")
            about = {"op": op, "backend": "", "case": "editors", "what": what}
            emit("check", **about, status="failed", detail=describe(error))
            if is_fatal(error):
                leave(error)


if __name__ == "__main__":
    main()
