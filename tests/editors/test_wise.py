"""The WISE editor: what it changes, what it reports, what it refuses."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from wise_worlds import EDITS, editor, settings

from pyeditfast import Edit, EditReport, WiseConfig, WiseEditor
from pyeditfast.editors import wise_training
from pyeditfast.errors import EditRejectedError, UnknownModuleError, UnsupportedWeightError
from pyeditfast.ops import random_mask

FAMILIES = ("llama", "gpt2", "gptj")


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_model_keeps_every_weight(family):
    wise = editor(family)
    before = weights_of(tiny_model(family, layers=4))
    wise.edit(EDITS[:2])
    after = wise.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_change_only_masked_elements_beyond_decay(family):
    wise = editor(family)
    wise.edit(EDITS[:2])
    memory, main = wise.memories.current, wise.memories.main
    mask = random_mask(0, 0.2, main.shape)
    moved = (memory.weight - main).abs()
    # Up to 24 steps of weight decay (lr 0.3) and of rounding.
    decay = 24 * (0.3 * 1e-5 + 2**-23) * main.abs() * 1.01
    assert bool((moved[~mask] <= decay[~mask]).all())
    assert float((moved[mask] > decay[mask]).float().mean()) > 0.5
    assert float(moved.max()) <= 1.0 + 1e-6


def test_edits_lower_the_loss_and_open_the_gap():
    wise = editor()
    report = wise.edit(EDITS[:1])
    memory = wise.memories.current
    assert report.edits == 1 and not report.rejected
    assert memory.smallest_gap > 1.0
    assert memory.threshold == pytest.approx(0.88 * memory.smallest_gap)
    assert wise.layer.thresholds.tolist() == pytest.approx([memory.threshold])


def test_the_same_seed_gives_the_same_bits():
    first, second, other = editor(), editor(), editor(seed=1)
    for wise in (first, second, other):
        wise.edit(EDITS[:2])
    assert torch.equal(first.memories.current.weight, second.memories.current.weight)
    assert not torch.equal(first.memories.current.weight, other.memories.current.weight)


def test_edits_one_by_one_equal_edits_in_one_call():
    together, apart = editor(), editor()
    together.edit(EDITS[:3])
    for edit in EDITS[:3]:
        apart.edit([edit])
    assert torch.equal(together.memories.current.weight, apart.memories.current.weight)
    assert together.records == apart.records == 3


def test_unusable_edits_are_reported_and_the_others_made():
    wise = editor()
    bad = [
        Edit("", "x"),
        Edit("The sky is", " "),
        Edit("The sky is", "blue", locality_prompt="The sky is"),
        Edit("The sky is", "blue", locality_prompt=""),
    ]
    report = wise.edit([bad[0], EDITS[0], *bad[1:]])
    assert report.edits == 1
    assert [rejection.index for rejection in report.rejected] == [0, 2, 3, 4]
    assert [rejection.reason for rejection in report.rejected] == [
        "the prompt is empty",
        "the target is empty",
        "the locality prompt is the edit's own prompt",
        "the locality prompt is empty",
    ]
    assert wise.records == 5 and wise.edits == 1


def test_strict_raises_and_changes_nothing():
    wise = editor()
    with pytest.raises(EditRejectedError, match="own prompt"):
        wise.edit([Edit("The sky is", "blue", locality_prompt="The sky is")], strict=True)
    assert wise.memories.all() == []
    assert wise.edits == 0


def test_something_else_than_an_edit_is_a_type_error():
    with pytest.raises(TypeError, match="edit 0 is a str"):
        editor().edit(["The sky is blue"])


def test_a_loss_that_is_not_finite_is_undone_and_reported():
    wise = editor()
    wise.edit(EDITS[:1])
    before = wise.memories.current.weight.clone()
    head = wise.model.get_output_embeddings()
    with torch.no_grad():
        kept = head.weight[0].clone()
        head.weight[0] = torch.nan
    report = wise.edit(EDITS[1:2])
    with torch.no_grad():
        head.weight[0] = kept
    assert report.edits == 0
    assert "not finite after 0 steps" in report.rejected[0].reason
    assert torch.equal(wise.memories.current.weight, before)
    assert len(wise.memories.current.edits) == 1


def test_an_edit_that_is_not_routed_is_reported():
    # With thresholds far above every gap no prompt leaves the main memory.
    wise = editor(act_ratio=100.0)
    report = wise.edit(EDITS[:2])
    assert report.edits == 2
    assert [item.index for item in report.not_routed] == [0, 1]
    assert "not routed edit 0" in str(report)
    assert "--calibrate" in str(report)
    assert "--calibrate" not in str(editor(calibrate=True, act_ratio=100.0).edit(EDITS[:2]))


def test_calibration_tells_its_errors():
    wise = editor(calibrate=True)
    report = wise.edit(EDITS[:4])
    assert len(wise.calibrations) == 1
    calibration = wise.calibrations[0]
    assert wise.memories.current.threshold == calibration.threshold
    assert math.isclose(calibration.missed, len(report.not_routed) / 4)
    assert report.calibrations == wise.calibrations
    assert f"side memory 0: expected errors: {100 * calibration.missed:.1f} % of" in str(report)
    assert report.to_dict()["calibrations"][0]["strayed"] == calibration.strayed


def test_activation_of_the_model_and_by_name():
    assert editor("llama").layer.activation == "silu"
    assert editor("gpt2").layer.activation == "gelu_tanh"
    assert editor(activation=None).layer.activation is None
    assert editor(activation="relu").layer.activation == "relu"


def test_an_activation_that_is_not_known_has_to_be_named():
    model = tiny_model("llama")
    model.config.hidden_act = "mish"
    with pytest.raises(ValueError, match="'mish'; known are silu"):
        WiseEditor(model, tiny_tokenizer(), settings())
    assert WiseEditor(model, tiny_tokenizer(), settings(activation="silu")).layer


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("model.layers.9.mlp.down_proj", UnknownModuleError),
        ("model.layers.1.mlp", UnsupportedWeightError),
        ("model.norm", UnsupportedWeightError),
    ],
)
def test_refuses_modules_that_cannot_be_edited(name, error):
    with pytest.raises(error):
        editor(edit_module=name)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj", "lm_head"])
def test_refuses_modules_outside_the_feed_forward_parts(name):
    with pytest.raises(UnsupportedWeightError, match="is not in the feed-forward part of a block"):
        editor(edit_module=name)


def test_detach_puts_the_module_back():
    wise = editor()
    module = tiny_model("llama", layers=4).get_submodule(wise.config.edit_module)
    wise.edit(EDITS[:1])
    model = wise.detach()
    assert type(model.get_submodule(wise.config.edit_module)) is type(module)
    assert "generate" not in vars(model)


def test_explain_names_memory_gap_and_threshold():
    wise = editor()
    assert wise.explain("The sky is") == "main memory: no edit has been made"
    wise.edit(EDITS[:1])
    told = wise.explain(EDITS[0].prompt)
    assert told.startswith("side memory 0 answers\n  side memory 0 (1 edit): gap ")
    assert "> threshold" in told
    with pytest.raises(ValueError, match="the prompt is empty"):
        wise.explain(" ")


def test_templates_are_sampled_once_and_by_seed():
    first, second, other = (editor(templates=None, seed=seed) for seed in (0, 0, 1))
    for wise in (first, second, other):
        wise.edit(EDITS[:1])
    assert first.templates[0] == "{}" and len(first.templates) == 11
    assert all(template.count("{}") == 1 for template in first.templates)
    assert first.templates == second.templates != other.templates


def test_sampling_templates_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    editor(templates=None).edit(EDITS[:1])
    assert torch.equal(torch.rand(2), expected)


def test_braces_in_prompts_and_targets_are_text():
    report = editor().edit([Edit("The set {a} or {} holds", "{b}")])
    assert report.edits == 1


def test_batches_of_edits_share_their_steps():
    wise = editor(batch_size=3, save_freq=9, merge_freq=9)
    report = wise.edit(EDITS)
    assert (report.edits, report.turns) == (6, 2)
    assert len(wise.memories.current.edits) == 6


def test_chat_templates():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<user> {{ m['content'] }} <end>{% endfor %} assistant:"
    )
    wise = WiseEditor(tiny_model("llama", layers=4), tokenizer, settings(chat_template=True))
    assert wise.edit(EDITS[:1]).edits == 1


def test_replay_trains_on_past_edits():
    plain, replayed = (
        editor(save_freq=1, merge_freq=1, replay=replay, n_iter=4) for replay in (False, True)
    )
    for wise in (plain, replayed):
        assert wise.edit(EDITS[:3]).edits == 3
    first = [wise.memories.merged[0].weight for wise in (plain, replayed)]
    last = [wise.memories.merged[2].weight for wise in (plain, replayed)]
    assert torch.equal(*first)
    assert not torch.equal(*last)


def test_inference_mode_of_the_caller_does_not_forbid_editing():
    wise = editor()
    with torch.inference_mode():
        assert wise.edit(EDITS[:1]).edits == 1


def test_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny_model("llama", dtype=dtype, layers=4)
        wise = WiseEditor(model, tiny_tokenizer(), settings())
        assert wise.edit(EDITS[:1]).edits == 1
        assert wise.memories.current.weight.dtype == dtype


def test_default_settings_need_no_module_name():
    wise = WiseEditor(tiny_model("llama", layers=4), tiny_tokenizer(), WiseConfig(n_iter=2))
    assert wise.config.edit_module == "model.layers.3.mlp.down_proj"


def test_a_model_that_was_converted_is_edited_on():
    wise = editor()
    wise.edit(EDITS[:1])
    wise.model.to(torch.float64)
    assert wise.edit(EDITS[1:2]).edits == 1
    assert wise.memories.current.weight.dtype == torch.float64
    assert len(wise.memories.current.edits) == 2


def test_the_pool_of_locality_prompts_is_walked_whatever_the_calls():
    alone = [Edit(edit.prompt, edit.target) for edit in EDITS[:4]]
    together, apart = (editor(locality_prompts=list("abcd"), n_iter=2) for _ in range(2))
    together.edit(alone)
    apart.edit(alone[:1])
    apart.edit(alone[1:])
    for wise in (together, apart):
        assert [edit.locality_prompt for edit in wise.memories.current.edits] == list("abcd")


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_reports_its_last_edit(monkeypatch):
    wise, report = editor(n_iter=3, act_ratio=100.0), EditReport()
    run = wise_training.SideMemoryTraining.run

    def interrupted(self, seed):
        if wise.edits == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return run(self, seed)

    monkeypatch.setattr(wise_training.SideMemoryTraining, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wise.edit(EDITS[:4], report=report)
    assert (wise.edits, wise.records) == (2, 2)
    assert (report.edits, report.turns) == (2, 2)
    assert [item.index for item in report.not_routed] == [0, 1]


def test_an_error_in_the_first_edit_of_a_shard_leaves_no_trace(monkeypatch):
    wise, clean = editor(), editor()
    losses, calls = wise_training.SuffixReplay.answer_losses, iter(range(1000))

    def failing(self, output):
        if next(calls) == 5:
            raise RuntimeError("in the middle")
        return losses(self, output)

    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="in the middle"):
        broken.setattr(wise_training.SuffixReplay, "answer_losses", failing)
        wise.edit(EDITS[:1])
    assert (wise.edits, wise.records, wise.memories.current) == (0, 0, None)
    for each in (wise, clean):
        each.edit(EDITS[:1])
    assert torch.equal(wise.memories.current.weight, clean.memories.current.weight)


def test_a_model_that_was_converted_after_a_rejected_first_edit_is_edited():
    wise = editor(edit_lr=1e30, norm_constraint=None)
    assert wise.edit(EDITS[:1]).rejected
    wise.model.to(torch.float64)
    wise.edit(EDITS[:1])
    assert wise.memories.main.dtype == torch.float64


def test_refuses_a_model_that_has_side_memories():
    wise = editor()
    with pytest.raises(ValueError, match="has side memories already"):
        WiseEditor(wise.model, wise.tokenizer, wise.config)


def test_a_detached_editor_leaves_the_model_alone():
    wise = editor()
    wise.edit(EDITS[:1])
    model = wise.detach()
    other = WiseEditor(model, wise.tokenizer, wise.config)
    with pytest.raises(ValueError, match="they were detached"):
        wise.detach()
    with pytest.raises(ValueError, match="they were detached"):
        wise.edit(EDITS[1:2])
    assert wise.edits == 1
    assert model.get_submodule(wise.config.edit_module) is other.layer


def test_explaining_samples_no_templates():
    wise = editor(templates=None)
    wise.explain("The sky is")
    assert wise.templates is None


def test_more_memories_than_the_kernels_take_are_named_once(caplog):
    wise = editor(save_freq=1, merge_freq=100, n_iter=1)
    wise.edit([*EDITS, *EDITS])
    told = [text for text in caplog.messages if "more than the GPU kernels take" in text]
    assert len(told) == 1 and told[0].startswith("9 side memories")


def test_more_memories_than_the_kernels_take_are_named_when_loaded(caplog, tmp_path):
    wise = editor(save_freq=1, merge_freq=100, n_iter=1)
    wise.edit([*EDITS, *EDITS])
    wise.save(tmp_path)
    caplog.clear()
    WiseEditor.load(tmp_path, tiny_model("llama", layers=4))
    assert [text.split(" are more")[0] for text in caplog.messages] == ["12 side memories"]


def test_what_is_no_model_and_what_are_no_settings_is_named():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(TypeError, match="model is a str; a model of Transformers"):
        WiseEditor("llama-2-7b", tokenizer)
    with pytest.raises(TypeError, match="config is a dict; a WiseConfig"):
        WiseEditor(model, tokenizer, {"n_iter": 3})


def test_a_tokenizer_without_a_chat_template_is_named_before_any_work():
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        editor(chat_template=True)
