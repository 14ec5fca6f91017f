"""The routed module by itself: what it keeps of the module it stands for, and what it refuses."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from routed_models import (
    ACTIVATION,
    FAMILIES,
    RoutedModel,
    generate,
    memories_of,
    padded,
    routed_model,
)
from tiny_models import mlp_modules, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from pyeditfast import reference
from pyeditfast.errors import UnknownModuleError, UnsupportedWeightError
from pyeditfast.model import wise_linear
from pyeditfast.model.query_routing import Route
from pyeditfast.model.wise_linear import WiseLinear, find_wise_linear, install, remove


@pytest.fixture
def routed() -> RoutedModel:
    return routed_model("llama")


def installed(family, **options):
    model = tiny_model(family)
    name = mlp_modules(model, family)[-1]
    settings = {"activation": ACTIVATION, "reduction": "auto", **options}
    return model, name, install(model, name, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_memories_it_is_the_linear_module(family):
    base = tiny_model(family)
    model, _, layer = installed(family)
    batch = padded([[5, 6, 7], [8, 9, 10, 11, 12]])
    torch.testing.assert_close(model(**batch).logits, base(**batch).logits, rtol=0, atol=1e-6)
    assert layer.routes() == []
    assert layer.side_weights == [] and layer.thresholds.shape == (0,)


@pytest.mark.parametrize("family", FAMILIES)
def test_install_and_remove_leave_the_model_as_it_was(family):
    model = tiny_model(family)
    name = mlp_modules(model, family)[-1]
    original = model.get_submodule(name)
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    attributes = set(vars(model))
    layer = install(model, name, activation=None, reduction="mean")
    assert find_wise_linear(model) is model.get_submodule(name) is layer
    assert layer.weight is original.weight and layer.bias is original.bias
    assert layer.main.data_ptr() == original.weight.data_ptr()
    assert (layer.out_features, layer.in_features) == tuple(layer.main.shape)
    layer.set_memories([layer.main * 1.1], [0.5])
    assert list(model.state_dict()) == keys
    assert dict(model.named_parameters()).keys() == parameters.keys()
    remove(model, name)
    assert model.get_submodule(name) is original
    assert set(vars(model)) == attributes
    for part in model.modules():
        assert not part._forward_pre_hooks and not part._forward_hooks
    for key, parameter in model.named_parameters():
        assert parameter is parameters[key]
    assert find_wise_linear(model) is None


def test_remove_keeps_what_was_loaded_meanwhile(routed):
    state = {key: value + 1 for key, value in routed.model.state_dict().items()}
    routed.model.load_state_dict(state, assign=True)
    remove(routed.model, routed.name)
    weight = routed.model.get_submodule(routed.name).weight
    assert torch.equal(weight, state[f"{routed.name}.weight"])


def test_generate_keeps_its_signature_and_any_earlier_wrapper():
    model = tiny_model("llama")
    names = ("generate", "prepare_inputs_for_generation")
    signatures = [inspect.signature(getattr(model, name)) for name in names]
    calls = []
    own = model.generate

    def wrapper(*args, **options):
        calls.append(options)
        return own(*args, **options)

    model.generate = wrapper
    name = mlp_modules(model, "llama")[-1]
    install(model, name, activation=None, reduction="mean")
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    assert calls == [{"max_new_tokens": 2}]
    remove(model, name)
    assert model.generate is wrapper
    del model.generate
    install(model, name, activation=None, reduction="mean")
    assert [inspect.signature(getattr(model, name)) for name in names] == signatures
    assert model.generate.__doc__ == own.__doc__


def test_modules_that_cannot_be_routed():
    model = tiny_model("llama")
    options = {"activation": None, "reduction": "auto"}
    with pytest.raises(UnknownModuleError, match=r"no module 'model\.layers\.9"):
        install(model, "model.layers.9.mlp.down_proj", **options)
    with pytest.raises(UnsupportedWeightError, match="LlamaMLP"):
        install(model, "model.layers.1.mlp", **options)
    name = mlp_modules(model, "llama")[-1]
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        install(model, name, activation="tanh", reduction="auto")
    with pytest.raises(ValueError, match="reduction is 'median'"):
        install(model, name, activation=None, reduction="median")
    assert find_wise_linear(model) is None
    install(model, name, **options)
    with pytest.raises(ValueError, match=f"{name} is routed already"):
        install(model, mlp_modules(model, "llama")[0], **options)
    with pytest.raises(ValueError, match="is a Linear, not a WiseLinear"):
        remove(model, mlp_modules(model, "llama")[0])


def test_memories_that_do_not_fit(routed):
    layer = routed.layer
    side = layer.side_weights[0]
    before = memories_of(layer), layer.thresholds.tolist()
    with pytest.raises(ValueError, match=r"sides\[0\] is torch.float32 \(64, 32\)"):
        layer.set_memories([side.T], [1.0])
    with pytest.raises(ValueError, match=r"sides\[0\] is torch.bfloat16"):
        layer.set_memories([side.bfloat16()], [1.0])
    with pytest.raises(ValueError, match=r"thresholds are \[1.0\]; one number for each of 2"):
        layer.set_memories([side, side], [1.0])
    with pytest.raises(ValueError, match=r"thresholds are \[nan\]"):
        layer.set_memories([side], [float("nan")])
    assert (memories_of(layer), layer.thresholds.tolist()) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_memories_are_not_copied(family):
    routed = routed_model(family)
    side = routed.layer.side_weights[0]
    routed.layer.set_memories([side], [-1.0])
    ids = torch.tensor([routed.prompts[0]])
    before = routed.model(ids).logits
    side.copy_(routed.layer.main)
    after = routed.model(ids).logits
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, routed.plain[-1](ids).logits, rtol=0, atol=1e-5)


def test_memories_can_be_replaced_and_taken_away(routed):
    layer = routed.layer
    sides, thresholds = layer.side_weights, layer.thresholds.tolist()
    layer.set_memories(sides[1:], thresholds[1:])
    assert layer.routes() == [] and len(layer.side_weights) == 1
    generate(routed.model, routed.prompts)
    assert set(memories_of(layer)) == {-1, 0}
    layer.set_memories([], [])
    answers = generate(routed.model, routed.prompts)
    assert answers == [routed.generate(prompt, -1) for prompt in routed.prompts]
    layer.set_memories(sides, thresholds)
    assert generate(routed.model, routed.prompts) == routed.expected()


def test_routes_say_what_was_decided(routed):
    generate(routed.model, routed.prompts)
    thresholds = tuple(routed.layer.thresholds.tolist())
    for route, memory, gaps in zip(routed.layer.routes(), routed.routes, routed.gaps, strict=True):
        assert isinstance(route, Route)
        assert route.memory == memory and route.thresholds == thresholds
        torch.testing.assert_close(torch.tensor(route.gaps), gaps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversion_keeps_the_thresholds(routed, dtype):
    exact = routed.layer.thresholds.clone()
    assert not torch.equal(exact.to(torch.bfloat16).float(), exact)
    routed.model.to(dtype)
    assert routed.layer.thresholds.dtype == torch.float32
    assert torch.equal(routed.layer.thresholds, exact)
    assert {side.dtype for side in routed.layer.side_weights} == {dtype}
    generate(routed.model, routed.prompts)
    assert len(routed.layer.routes()) == len(routed.prompts)


def test_moving_moves_everything(routed):
    routed.model.to("meta")
    assert {side.device.type for side in routed.layer.side_weights} == {"meta"}
    assert routed.layer.thresholds.device.type == "meta"


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_gives_the_base_model_and_says_so_once(family, tmp_path, caplog):
    routed = routed_model(family)
    generate(routed.model, routed.prompts)
    routed.model.save_pretrained(tmp_path)
    routed.model.state_dict()
    (said,) = [record for record in caplog.records if record.name.startswith("pyeditfast")]
    assert "without its 2 side memories; WiseEditor.save(directory)" in said.getMessage()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    base = routed.plain[-1].state_dict()
    assert loaded.state_dict().keys() == base.keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, base[key])


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_whole(family, duplicate):
    routed = routed_model(family)
    with torch.inference_mode():
        generate(routed.model, routed.prompts)
    twin = duplicate(routed.model)
    layer = find_wise_linear(twin)
    assert isinstance(layer, WiseLinear) and layer is not routed.layer
    assert layer.routes() == routed.layer.routes()
    layer.set_memories(layer.side_weights[:1], [-1.0])
    ours = generate(twin, routed.prompts)
    assert ours == [routed.generate(prompt, 0) for prompt in routed.prompts]
    remove(twin, routed.name)
    assert ours != generate(twin, routed.prompts)
    assert memories_of(routed.layer) == routed.routes
    assert generate(routed.model, routed.prompts) == routed.expected()


def test_suspended(routed):
    cache = DynamicCache()
    ids = torch.tensor(routed.prompts[:1])
    routed.model(ids, past_key_values=cache)
    before = routed.layer.routes()
    with routed.layer.suspended():
        answers = generate(routed.model, routed.prompts)
        with routed.layer.suspended():
            routed.model(ids)
        logits = routed.model(ids).logits
        unknown = DynamicCache()
        routed.plain[-1](ids, past_key_values=unknown)
        routed.model(ids, past_key_values=unknown)
    with pytest.raises(ValueError, match="whose queries are not known"):
        routed.model(ids, past_key_values=unknown)
    assert answers == [routed.generate(prompt, -1) for prompt in routed.prompts]
    torch.testing.assert_close(logits, routed.plain[-1](ids).logits, rtol=0, atol=1e-5)
    assert routed.layer.routes() == before
    step = torch.tensor([[7]])
    ours = routed.model(step, past_key_values=cache).logits
    whole = routed.plain[routed.routes[0]](torch.cat([ids, step], 1)).logits[:, -1:]
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)


def test_called_by_itself(routed):
    x = torch.randn(3, 5, routed.layer.in_features)
    routed.model(torch.tensor([[5, 6, 7]]))
    with torch.no_grad():
        alone = [routed.layer(row) for row in x]
        together = routed.layer(x)
    assert len(routed.layer.routes()) == 3
    torch.testing.assert_close(together, torch.stack(alone))


def test_rows_of_several_sequences_are_refused(routed):
    lengths = torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        routed.model(torch.tensor([[5, 6, 7, 8, 9]]), cu_seq_lens_q=lengths)


def test_a_mask_that_does_not_fit(routed):
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\); \(2, 6\) is needed"):
        routed.model(torch.ones(2, 6, dtype=torch.int64), attention_mask=torch.ones(2, 4))


def test_a_module_that_sees_other_tokens(routed):
    routed.model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: args[0][:, 1:])
    with pytest.raises(ValueError, match="saw 4 of the 5 tokens"):
        routed.model(torch.tensor([[5, 6, 7, 8, 9]]))


class HostTransfers(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "_unique2", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name.removeprefix("aten::") in self.WAITING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_moves_to_the_host(family, kind, monkeypatch):
    routed = routed_model(family)
    batch = padded(routed.prompts)
    # The equations alone: on a CPU the op looks at the route that it is given.
    monkeypatch.setattr(wise_linear, "routed_linear", reference.routed_linear)

    def count(model):
        cache = DynamicCache() if kind == "dynamic" else None
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=40)
        with HostTransfers() as transfers, torch.no_grad():
            positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            model(**batch, position_ids=positions, past_key_values=cache)
            mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
            if cache is not None:
                step = {"attention_mask": mask, "position_ids": positions[:, -1:] + 1}
                model(torch.full((8, 1), 9), **step, past_key_values=cache)
        return transfers.count

    assert count(routed.model) == count(routed.plain[-1])
    assert memories_of(routed.layer) == routed.routes
