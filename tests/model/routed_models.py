"""Tiny models with a routed module, and what plain models say that each prompt should get."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import PAD_ID, mlp_modules, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from pyeditfast import reference
from pyeditfast.model.edit_modules import find_edit_modules
from pyeditfast.model.wise_linear import WiseLinear, install

FAMILIES = ("llama", "gpt2", "gptj")
ACTIVATION = "silu"


@dataclass
class RoutedModel:
    """A model with a routed module, and a plain one for each memory: ``plain[-1]`` is the base."""

    model: PreTrainedModel
    layer: WiseLinear
    name: str
    plain: dict[int, PreTrainedModel]
    prompts: list[list[int]]
    gaps: list[Tensor]
    routes: list[int]

    def generate(self, prompt: Sequence[int], route: int, **options: Any) -> list[int]:
        """Return what the plain model with memory ``route`` generates."""
        return generate(self.plain[route], [prompt], **options)[0]

    def expected(self, **options: Any) -> list[list[int]]:
        """Return what should be generated for each prompt."""
        pairs = zip(self.prompts, self.routes, strict=True)
        return [self.generate(prompt, route, **options) for prompt, route in pairs]


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 400, (n,), generator=generator).tolist() for n in lengths]


def padded(prompts: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
    """Return ids and mask, padded on the ``side``."""
    longest = max(map(len, prompts))
    rows, masks = [], []
    for prompt in prompts:
        pads = [PAD_ID] * (longest - len(prompt))
        real, none = [1] * len(prompt), [0] * len(pads)
        rows.append([*pads, *prompt] if side == "left" else [*prompt, *pads])
        masks.append([*none, *real] if side == "left" else [*real, *none])
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def generate(model: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """Return the new tokens of each prompt; greedy, unless ``options`` say other."""
    batch = padded(prompts)
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    rows = model.generate(**batch, **options)
    return rows[:, batch["input_ids"].shape[1] :].tolist()


def module_input(model: PreTrainedModel, name: str, prompt: Sequence[int]) -> Tensor:
    """Return what the module reads for one prompt, ``[1, tokens, d_in]``."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model(torch.tensor([list(prompt)]), use_cache=False)
    handle.remove()
    return seen[0].reshape(1, len(prompt), -1)


def gaps_of(
    model: PreTrainedModel,
    name: str,
    prompt: Sequence[int],
    sides: Sequence[Tensor],
    reduction: str = "auto",
) -> Tensor:
    """Return the gaps ``[memories]`` of one prompt by the reference."""
    module = find_edit_modules(model, [name])[0]
    return reference.activation_gap(
        module_input(model, name, prompt).float(),
        module.weight.float(),
        [side.float() for side in sides],
        bias=None if module.module.bias is None else module.module.bias.detach().float(),
        activation=ACTIVATION,
        reduction=reduction,
    )[0]


def between(values: Tensor) -> float:
    """Return a threshold in the middle half of ``values``, where it is widest between two."""
    ordered = values.sort().values
    middle = range(len(ordered) // 4, -(-3 * len(ordered) // 4))
    place = max((i for i in middle if i), key=lambda i: float(ordered[i] - ordered[i - 1]))
    return float(ordered[place] + ordered[place - 1]) / 2


def routed_model(
    family: str,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    memories: int = 2,
    dtype: torch.dtype = torch.float32,
    reduction: str = "auto",
    last_block: bool = True,
    layers: int = 3,
) -> RoutedModel:
    """Return a model whose routed module sends ``prompts`` to all of its memories.

    What the module gives reaches the caches of the blocks behind it, unless it is in the
    ``last_block``: only there a prompt in pieces, some of them run with another route than the one
    that is decided in the end, equals a prompt in one piece.
    """
    made = random_prompts([5, 9, 3, 12, 7, 4, 10, 6]) if prompts is None else prompts
    chosen = [list(prompt) for prompt in made]
    model = tiny_model(family, dtype=dtype, layers=layers)
    # A row that ends early would be padded in a batch and not alone.
    model.generation_config.eos_token_id = None
    name = mlp_modules(model, family)[-1 if last_block else 0]
    main = find_edit_modules(model, [name])[0].weight
    generator = torch.Generator().manual_seed(1)
    sides = [
        main + (0.3 * torch.randn(main.shape, generator=generator)).to(dtype)
        for _ in range(memories)
    ]
    plain = {-1: copy.deepcopy(model)}
    for number, side in enumerate(sides):
        plain[number] = copy.deepcopy(model)
        find_edit_modules(plain[number], [name])[0].weight.copy_(side)
    gaps = [gaps_of(model, name, prompt, sides, reduction) for prompt in chosen]
    thresholds = torch.tensor([between(column) for column in torch.stack(gaps, -1)])
    routes = [int(reference.choose_route(gap[None], thresholds)) for gap in gaps]
    assert set(routes) == {-1, *range(memories)}, routes
    layer = install(model, name, activation=ACTIVATION, reduction=reduction)
    layer.set_memories(sides, thresholds.tolist())
    return RoutedModel(model, layer, name, plain, chosen, gaps, routes)


def memories_of(layer: WiseLinear) -> list[int]:
    """Return the memory of each row of the last batch."""
    return [route.memory for route in layer.routes()]
