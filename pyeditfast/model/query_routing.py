"""Which tokens of a forward pass decide the routes of its queries, and where the routes are kept.

A hook on the part of the model that holds the blocks looks at the arguments of every forward pass.
The routes of a batch live as long as its key-value cache: they are an attribute of the cache, so
that conversations may take turns and a copied cache takes its routes along.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeditfast.model.generation_prompt import GenerationPrompt, PreparedCall
from pyeditfast.model.model_call import ModelCall, Route, RoutedQueries
from pyeditfast.model.packing import PackedLayout
from pyeditfast.model.recomputed_calls import RecomputedCalls, in_backward

ON_CACHE = "pyeditfast_queries"
"""The attribute of a cache that holds its ``RoutedQueries``."""


class QueryRouting:
    """Follows the forward passes of one model and tells its routed module what each of them is.

    ``active`` while there are side memories. ``last`` are the queries decided last; the routed
    module sets it, and notes in ``recomputed`` what it runs in training mode. ``prompt`` is set
    while ``generate`` runs.
    """

    def __init__(self) -> None:
        self.active = False
        self.suspended = False
        self.prompt: GenerationPrompt | None = None
        self.last: RoutedQueries | None = None
        self.recomputed = RecomputedCalls()
        self._prepared: PreparedCall | None = None
        self._prompt_lengths: list[int] | None = None
        self._call: ModelCall | None = None
        self._within = False
        self._names: list[str] = []
        self._handles: list[Any] = []

    def attach(self, root: nn.Module) -> None:
        """Follow the forward passes of ``root``, which holds the model's blocks."""
        self._names = list(inspect.signature(root.forward).parameters)
        self._handles = [
            root.register_forward_pre_hook(self._begin, with_kwargs=True),
            root.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        """Follow no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._call = None

    def prepare(self, attention_mask: Any) -> None:
        """Note that ``generate`` is about to make a forward pass."""
        if self.prompt is None:
            return
        self._prepared = PreparedCall(self.prompt, _two_dimensional(attention_mask))
        queries = self.prompt.queries
        if queries is not None and not queries.decoding:
            queries.settle()

    @contextlib.contextmanager
    def suspend(self) -> Iterator[None]:
        """Ignore forward passes inside a ``with`` block."""
        before, self.suspended = self.suspended, True
        try:
            yield
        finally:
            self.suspended = before

    @contextlib.contextmanager
    def prompts_of(self, lengths: Sequence[int]) -> Iterator[None]:
        """Let only the first ``lengths[q]`` tokens of each query ``q`` decide inside a ``with``
        block.
        """
        if any(length < 0 for length in lengths):
            raise ValueError(f"lengths of prompts are {list(lengths)}; 0 or more are needed")
        before, self._prompt_lengths = self._prompt_lengths, list(lengths)
        try:
            yield
        finally:
            self._prompt_lengths = before

    def call_of(self, x: Tensor) -> ModelCall:
        """Return the forward pass that a module's input ``x`` belongs to.

        Outside a forward pass: in a backward pass, where gradient checkpointing runs the module
        again, the one that it ran in first; else the rows of ``x`` are queries of their own.
        """
        tokens = x.shape[:-1].numel()
        if self._within and self._call is not None:
            if self._call.tokens != tokens:
                raise ValueError(
                    f"a routed module saw {tokens} of the {self._call.tokens} tokens of its pass; "
                    "only modules that see every token once can be routed"
                )
            return self._call
        if in_backward():
            return self.recomputed.find(x)
        rows, columns = (1, tokens) if x.ndim == 2 else (x.shape[:-2].numel(), x.shape[-2])
        return ModelCall(RoutedQueries(), rows, columns, decides=True)

    def _begin(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        prepared, self._prepared = self._prepared, None
        if self.suspended or not self.active:
            return
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given.get("inputs_embeds")
        if tokens is None:
            return
        if given.get("cu_seq_lens_q") is not None:
            raise ValueError(
                "a row of several sequences (cu_seq_lens_q) cannot be routed; pad them instead"
            )
        rows, columns = tokens.shape[0], tokens.shape[1]
        layout = given.get("packed_layout")
        if layout is not None:
            self._call = self._packed_call(layout, tokens.device)
        elif prepared is not None:
            self._call = self._generation_call(prepared, given, rows, columns)
        else:
            self._call = self._plain_call(root, given, rows, columns, tokens.device)
        self._within = True

    def _end(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self._within or self._call is None:
            return
        self._within = False
        if self._call.decides and self._call.layout is None:
            _keep_on(_cache_of(output), self._call.queries)

    def _packed_call(self, layout: PackedLayout, device: torch.device) -> ModelCall:
        rows, columns = len(layout.lengths), layout.longest
        lengths = torch.tensor(layout.lengths, device=device)
        real = torch.arange(columns, device=device) < lengths[:, None]
        mask = self._only_prompts(real, rows, columns, device)
        return ModelCall(RoutedQueries(), rows, columns, True, mask, layout)

    def _plain_call(
        self,
        root: nn.Module,
        given: dict[str, Any],
        rows: int,
        columns: int,
        device: torch.device,
    ) -> ModelCall:
        cache = given.get("past_key_values")
        queries, past = _queries_of(cache, columns)
        if past and (columns == 1 or queries.decoding):
            queries.decoding = True
            return ModelCall(queries, rows, columns, decides=False)
        mask = _own_columns(_two_dimensional(given.get("attention_mask")), rows, past, columns)
        if not past:
            mask = self._only_prompts(mask, rows, columns, device)
            _keep_on(cache, queries)
        uses_cache = given.get("use_cache")
        if uses_cache is None:
            uses_cache = getattr(getattr(root, "config", None), "use_cache", False)
        return ModelCall(
            queries,
            rows,
            columns,
            decides=True,
            mask=mask,
            continues=past > 0,
            may_continue=cache is not None or bool(uses_cache),
        )

    def _generation_call(
        self, prepared: PreparedCall, given: dict[str, Any], rows: int, columns: int
    ) -> ModelCall:
        prompt = prepared.prompt
        if prompt.queries is None:
            self._begin_prompt(prompt, given.get("past_key_values"))
        queries = prompt.queries
        assert queries is not None
        if prompt.complete:
            queries.decoding = True
            return ModelCall(queries, rows, columns, decides=False)
        mask = _two_dimensional(given.get("attention_mask"))
        if mask is None:
            mask = prepared.attention_mask
        past = prompt.seen
        mask = _own_columns(mask, rows, past, columns)
        prompt.seen += columns
        prompt.complete = prompt.seen >= prompt.columns
        if prompt.seen > prompt.columns:
            # Candidates of assisted decoding.
            if mask is None:
                mask = torch.ones(rows, columns, dtype=torch.bool, device=_device_of(given))
            places = torch.arange(columns, device=mask.device)
            mask = mask & (places < prompt.columns - past)
        return ModelCall(
            queries,
            rows,
            columns,
            decides=True,
            mask=mask,
            continues=past > 0,
            may_continue=prompt.cache_outlives or not prompt.complete,
        )

    def _begin_prompt(self, prompt: GenerationPrompt, cache: Any) -> None:
        queries, past = _queries_of(cache)
        _keep_on(cache, queries)
        prompt.queries = queries
        prompt.seen = past
        prompt.complete = bool(past) and prompt.assists

    def _only_prompts(
        self, mask: Tensor | None, rows: int, columns: int, device: torch.device
    ) -> Tensor | None:
        if self._prompt_lengths is None:
            return mask
        if len(self._prompt_lengths) != rows:
            raise ValueError(
                f"{len(self._prompt_lengths)} prompt lengths are given and a pass has {rows} "
                "queries"
            )
        if mask is None:
            mask = torch.ones(rows, columns, dtype=torch.bool, device=device)
        lengths = torch.tensor(self._prompt_lengths, device=mask.device)
        return mask & (mask.cumsum(-1) <= lengths[:, None])


def _two_dimensional(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _own_columns(mask: Tensor | None, rows: int, past: int, columns: int) -> Tensor | None:
    """Return the part of an attention mask that belongs to the tokens of this pass."""
    if mask is None:
        return None
    own = mask[:, past : past + columns] if mask.shape[1] >= past + columns else mask
    if own.shape[1] != columns or own.shape[0] not in (1, rows):
        raise ValueError(
            f"the attention mask has shape {tuple(mask.shape)}; "
            f"({rows}, {past + columns}) is needed"
        )
    return own.bool().expand(rows, columns)


def _queries_of(cache: Any, columns: int = 0) -> tuple[RoutedQueries, int]:
    """Return the queries that a pass of ``columns`` goes on with, new ones where its cache is empty
    or None, and the number of columns in the cache.
    """
    queries: RoutedQueries | None = getattr(cache, ON_CACHE, None)
    past = 0 if cache is None else cache.get_seq_length()
    if isinstance(past, Tensor):
        # A static cache counts on its device. A single token after a prompt is decoding, whatever
        # the count: decoding does not wait for the device.
        past = 1 if columns == 1 and queries is not None else int(past)
    if not past:
        return RoutedQueries(), 0
    if queries is None:
        raise ValueError(
            f"the cache holds {past} columns whose queries are not known; fill it with this model, "
            "after its side memories are set"
        )
    return queries, past


def _cache_of(output: Any) -> Any:
    items = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
    return next((item for item in items if hasattr(item, "get_seq_length")), None)


def _keep_on(cache: Any, queries: RoutedQueries) -> None:
    if hasattr(cache, "get_seq_length"):
        setattr(cache, ON_CACHE, queries)


def _device_of(given: dict[str, Any]) -> torch.device:
    tokens = given.get("input_ids")
    device: torch.device = (given["inputs_embeds"] if tokens is None else tokens).device
    return device


__all__ = ["ON_CACHE", "QueryRouting", "Route"]
