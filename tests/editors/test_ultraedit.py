"""What UltraEditor does with good edits, bad edits, interrupts and failures."""

from __future__ import annotations

import dataclasses
import signal

import pytest
import torch
from facts import facts
from tiny_models import mlp_modules, tiny_model, tiny_tokenizer

from pyeditfast import Edit, EditReport, UltraEditConfig, UltraEditor
from pyeditfast.editors import ultraedit
from pyeditfast.editors.interrupts import interrupt_held_back
from pyeditfast.errors import (
    EditRejectedError,
    NotPositiveDefiniteError,
    PassTooLargeError,
    ShiftOverflowError,
    UnknownModuleError,
)
from pyeditfast.model.runner import ModelRunner
from pyeditfast.ops import Shift


def make_editor(family="llama", dtype=torch.float32, **settings) -> UltraEditor:
    model = tiny_model(family, dtype)
    settings = {"lr": 1e-4, "turn_size": 10, **settings}
    config = UltraEditConfig(mlp_modules(model, family), **settings)
    return UltraEditor(model, tiny_tokenizer(), config)


def weights(editor: UltraEditor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], after[name]) for name in before)


def test_the_report():
    editor = make_editor()
    before = weights(editor)
    report = editor.edit(facts(25))
    assert (report.edits, report.turns, report.rejected) == (25, 3, [])
    assert (editor.edits, editor.turns, editor.records) == (25, 3, 25)
    assert {"tokenize", "forward", "backward", "solve", "apply", "total"} <= set(report.seconds)
    assert sum(report.seconds.values()) <= 2.01 * report.seconds["total"]
    assert report.edits_per_second == pytest.approx(25 / report.seconds["total"])
    assert report.peak_memory_bytes > 1 << 20
    assert "25 edits in 3 turns" in str(report)
    after = weights(editor)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in editor.config.edit_modules}


def test_the_same_edits_give_the_same_bits():
    first, second = make_editor(), make_editor()
    first.edit(facts(25))
    second.edit(iter(facts(25)))
    assert same(weights(first), weights(second))


@pytest.mark.parametrize("edits", [[], facts(1)])
def test_hardly_any_edits(edits):
    editor = make_editor()
    report = editor.edit(edits)
    assert report.edits == len(edits)
    assert all(tensor.isfinite().all() for tensor in weights(editor).values())


@pytest.mark.parametrize("variance", ["unbiased", "published"])
def test_a_turn_of_one_answer_token(variance):
    class OneToken:
        def __call__(self, texts, add_special_tokens=True, **options):
            return {"input_ids": [[5, 6, 7] if add_special_tokens else [9] for _ in texts]}

    editor = make_editor(variance=variance)
    editor.tokenizer = OneToken()
    for _ in range(3):
        assert editor.edit([Edit("one", "token")]).edits == 1
    assert next(iter(editor.moments.values())).count == 3 * 2
    assert all(tensor.isfinite().all() for tensor in weights(editor).values())


def test_bad_edits_are_reported_and_the_others_carried_out():
    good = facts(12)
    bad = [Edit("", "x"), Edit("x", " "), Edit("word " * 300, "x")]
    editor, clean = make_editor(), make_editor()
    report = editor.edit([*good[:5], *bad, *good[5:]])
    clean.edit(good)
    assert report.edits == 12
    assert [rejection.index for rejection in report.rejected] == [5, 6, 7]
    reasons = [rejection.reason for rejection in report.rejected]
    assert reasons[:2] == ["the prompt is empty", "the target is empty"]
    assert "exceed the model's context of 256" in reasons[2]
    # Rejected edits take no place in a turn.
    assert same(weights(editor), weights(clean))
    assert editor.records == 15


def test_strict_stops_before_the_turn_of_the_bad_edit():
    editor, clean = make_editor(), make_editor()
    with pytest.raises(EditRejectedError, match=r"edit 12 .*the target is empty"):
        editor.edit([*facts(12), Edit("x", "")], strict=True)
    clean.edit(facts(10))
    assert same(weights(editor), weights(clean))
    assert editor.records == 10


def test_the_last_of_two_targets_for_one_prompt_wins():
    edits = facts(8)
    twice = dataclasses.replace(edits[3], target="Samarkand")
    editor, clean = make_editor(), make_editor()
    report = editor.edit([*edits, twice])
    clean.edit([*edits[:3], *edits[4:], twice])
    (rejection,) = report.rejected
    assert rejection.index == 3
    assert "edit 8 gives the same prompt another target" in rejection.reason
    assert same(weights(editor), weights(clean))
    # In another turn it is a new edit, not a conflict.
    assert make_editor(turn_size=8).edit([*edits, twice]).rejected == []


def test_nan_in_one_edit_rejects_that_edit_alone():
    edits = facts(9)
    poisoned = Edit("zebra \u2603 crossing", "Oslo")
    editor, clean = make_editor(), make_editor()
    token = editor.tokenizer(poisoned.prompt)["input_ids"]
    used = {i for e in edits for i in editor.tokenizer(e.prompt + " " + e.target)["input_ids"]}
    (rare, *_) = [i for i in token if i not in used]
    for model in (editor.model, clean.model):
        with torch.no_grad():
            model.get_input_embeddings().weight[rare] = float("nan")
    report = editor.edit([*edits[:4], poisoned, *edits[4:]])
    clean.edit(edits)
    (rejection,) = report.rejected
    assert (rejection.index, rejection.reason) == (4, "a key or a gradient is NaN or infinite")
    for name in editor.config.edit_modules:
        ours = editor.model.get_submodule(name).weight
        other = clean.model.get_submodule(name).weight
        # Another packing of the same edits, so rounding differs; the edit itself left no trace.
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)
    with pytest.raises(EditRejectedError, match="NaN"):
        make_poisoned(rare).edit([poisoned], strict=True)


def make_poisoned(token):
    editor = make_editor()
    with torch.no_grad():
        editor.model.get_input_embeddings().weight[token] = float("nan")
    return editor


def test_a_model_full_of_nan_changes_nothing():
    editor = make_editor()
    with torch.no_grad():
        editor.model.lm_head.weight.fill_(float("nan"))
    before = weights(editor)
    report = editor.edit(facts(12))
    assert (report.edits, report.turns, len(report.rejected)) == (0, 0, 12)
    assert all(torch.equal(before[n], t) for n, t in weights(editor).items() if "mlp" in n)
    assert all(moments.count == 0 for moments in editor.moments.values())


@pytest.mark.parametrize("phase", ["turn_gradients", "edit_values", "solve_shift"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, NotPositiveDefiniteError, PassTooLargeError])
def test_a_failure_leaves_the_last_whole_turn(monkeypatch, phase, error):
    editor, clean = make_editor(), make_editor()
    original = getattr(ultraedit, phase)
    calls = []

    def failing(*args, **options):
        calls.append(None)
        if editor.turns == 2:
            raise error("failed on purpose")
        return original(*args, **options)

    monkeypatch.setattr(ultraedit, phase, failing)
    with pytest.raises(error):
        editor.edit(facts(35))
    monkeypatch.undo()
    clean.edit(facts(20))
    assert same(weights(editor), weights(clean))
    assert (editor.turns, editor.records) == (2, 20)
    for shape, moments in editor.moments.items():
        assert moments.count == clean.moments[shape].count
        assert torch.equal(moments.mean, clean.moments[shape].mean)
    # And it can go on.
    editor.edit(facts(35)[20:])
    clean.edit(facts(35)[20:])
    assert same(weights(editor), weights(clean))


def test_numerical_errors_name_turn_and_module(monkeypatch):
    def failing(*args):
        raise NotPositiveDefiniteError("no factor")

    editor = make_editor()
    monkeypatch.setattr(ultraedit, "solve_shift", failing)
    expected = r"turn 0, model\.layers\.1\.mlp\.down_proj: no factor"
    with pytest.raises(NotPositiveDefiniteError, match=expected):
        editor.edit(facts(3))


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_weights_are_written_waits(monkeypatch):
    editor, clean = make_editor(), make_editor()
    original = ultraedit.apply_shift_
    writes = []

    def interrupted(*args, **options):
        if not writes:
            signal.raise_signal(signal.SIGINT)
        writes.append(None)
        return original(*args, **options)

    monkeypatch.setattr(ultraedit, "apply_shift_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(facts(30))
    monkeypatch.undo()
    assert len(writes) == len(editor.modules)
    clean.edit(facts(10))
    assert same(weights(editor), weights(clean))
    assert editor.records == 10


def test_the_interrupt_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), interrupt_held_back():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_16_bit_models_with_every_rounding(dtype, rounding):
    first = make_editor(dtype=dtype, rounding=rounding)
    second = make_editor(dtype=dtype, rounding=rounding)
    before = weights(first)
    assert first.edit(facts(20)).edits == 20
    second.edit(facts(20))
    assert same(weights(first), weights(second))
    assert not same(before, weights(first))
    assert first.model.dtype == dtype


def test_stochastic_rounding_follows_the_seed():
    results = []
    for seed in (0, 1):
        editor = make_editor(dtype=torch.bfloat16, rounding="stochastic", seed=seed)
        editor.edit(facts(10))
        results.append(weights(editor))
    assert not same(*results)


def test_default_modules_and_their_log(caplog):
    with caplog.at_level("INFO"):
        editor = UltraEditor(tiny_model("llama", layers=5), tiny_tokenizer())
    assert editor.config.edit_modules == (
        "model.layers.2.mlp.down_proj",
        "model.layers.3.mlp.down_proj",
    )
    assert "editing model.layers.2.mlp.down_proj" in caplog.text


def test_wrong_arguments():
    with pytest.raises(UnknownModuleError, match="nearest"):
        UltraEditor(tiny_model("llama"), tiny_tokenizer(), UltraEditConfig(["model.layers.9.mlp"]))
    with pytest.raises(TypeError, match=r"edit 0 is a tuple, not a pyeditfast\.Edit"):
        make_editor().edit([("prompt", "target")])


def test_a_model_spread_over_places_gives_the_same_bits(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    whole, spread = make_editor(), make_editor()
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.layers.2": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    accelerate.dispatch_model(spread.model, places, offload_dir=tmp_path, main_device="cpu")
    spread = UltraEditor(spread.model, spread.tokenizer, spread.config)
    spread.edit(facts(20))
    whole.edit(facts(20))
    for name in whole.config.edit_modules:
        ours = spread.model.get_submodule(name).weight
        assert torch.equal(ours, whole.model.get_submodule(name).weight)


def test_no_weight_is_written_if_one_would_be_refused():
    editor = make_editor(dtype=torch.float16)
    last = editor.modules[-1].weight
    last[0, 0] = 65504.0
    before = weights(editor)
    # The head feels the huge weight; only the range check is of interest here.
    shift = Shift("dual", 1, left=torch.full((1, 32), 40.0), right=torch.ones(1, 64))
    with pytest.raises(
        ShiftOverflowError, match=r"turn 0, model\.layers\.2\.mlp\.down_proj: a shift"
    ):
        editor._apply([shift, shift])
    assert same(before, weights(editor))


def test_stochastic_rounding_of_wide_weights_is_refused_at_once():
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj is not one"):
        make_editor(rounding="stochastic")


def test_an_edit_too_long_for_memory_is_rejected_alone(monkeypatch):
    edits = facts(9)
    long = Edit("word " * 100 + "is", "Oslo")
    editor, clean = make_editor(), make_editor()
    original = ModelRunner.answer_logits

    def limited(self, batch):
        if batch.inputs["input_ids"].numel() > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch)

    monkeypatch.setattr(ModelRunner, "answer_logits", limited)
    report = editor.edit([*edits[:5], long, *edits[5:]])
    clean.edit(edits)
    (rejection,) = report.rejected
    assert rejection.index == 5
    assert "does not fit in memory" in rejection.reason
    assert editor.edits == clean.edits == 9
    for name in editor.config.edit_modules:
        ours = editor.model.get_submodule(name).weight
        torch.testing.assert_close(ours, clean.model.get_submodule(name).weight, rtol=0, atol=1e-6)


def test_editing_inside_inference_mode():
    editor, clean = make_editor(), make_editor()
    with torch.inference_mode():
        editor.edit(facts(10))
    clean.edit(facts(10))
    assert same(weights(editor), weights(clean))


def test_a_report_outlives_an_error():
    report = EditReport()
    with pytest.raises(EditRejectedError):
        make_editor().edit([*facts(12), Edit("x", "")], strict=True, report=report)
    assert (report.edits, report.turns) == (10, 1)
    assert report.seconds["total"] > 0
