"""The routed linear module of WISE: a main memory, side memories, and a route for every query."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from pyeditfast.model.edit_modules import find_edit_modules
from pyeditfast.model.gap_sums import GapSums, all_are_long, counted_tokens
from pyeditfast.model.generation_prompt import RoutedGenerate, RoutedPrepareInputs
from pyeditfast.model.model_call import ModelCall, Route, RoutedQueries
from pyeditfast.model.query_routing import QueryRouting
from pyeditfast.ops.activation_gap import activation_gap
from pyeditfast.ops.choose_route import choose_route
from pyeditfast.ops.memories import check_activation, check_memories
from pyeditfast.ops.routed_linear import routed_linear
from pyeditfast.reference.activation_gap import MEAN_UP_TO, REDUCTIONS

logger = logging.getLogger(__name__)


class WiseLinear(nn.Module):
    """Stands where an ``nn.Linear`` or a ``Conv1D`` stood, and answers every query from the main
    memory or from the side memory that its activation gap chooses.

    ``weight`` and ``bias`` are the parameters of the module that stood here, in its layout; side
    memories and thresholds are not in the state dict, which stays that of the base model. With no
    side memory it is a plain linear module. The route of a query is decided from the tokens of its
    prompt and kept while the query decodes; what a prompt is, ``QueryRouting`` knows. Nothing is
    sent to the host, except by ``routes``.

    WISE (arXiv 2405.14768), section 2.3.1.
    """

    weight: Tensor
    bias: Tensor | None
    thresholds: Tensor

    def __init__(
        self, original: nn.Linear | Conv1D, *, activation: str | None, reduction: str
    ) -> None:
        super().__init__()
        check_activation("activation", activation)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; choose one of {', '.join(REDUCTIONS)}")
        self.weight = original.weight
        self.register_parameter("bias", original.bias)
        self.activation = activation
        self.reduction = reduction
        self.routing = QueryRouting()
        # In a tuple: as a submodule it would double the entries of the state dict.
        self._original = (original,)
        self._transposed = isinstance(original, Conv1D)
        self._count = 0
        self._memories = 0
        self._warned = False
        empty = torch.zeros(0, dtype=torch.float32, device=self.weight.device)
        self.register_buffer("thresholds", empty, persistent=False)
        self.train(original.training)
        self.register_state_dict_pre_hook(_warn_of_side_memories)
        _register_operator()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _register_operator()

    @property
    def main(self) -> Tensor:
        """Return the main memory ``[d_out, d_in]``, which shares storage with ``weight``."""
        return self.weight.T if self._transposed else self.weight

    @property
    def side_weights(self) -> list[Tensor]:
        """Return the side memories ``[d_out, d_in]``, in the model's dtype."""
        return [getattr(self, f"side_{number}") for number in range(self._count)]

    @property
    def in_features(self) -> int:
        """Return the width of the input."""
        return self.main.shape[1]

    @property
    def out_features(self) -> int:
        """Return the width of the output."""
        return self.main.shape[0]

    def set_memories(self, side_weights: Sequence[Tensor], thresholds: Sequence[float]) -> None:
        """Replace the side memories ``[d_out, d_in]`` and their thresholds.

        The tensors are not copied and may be updated in place; after ``model.to(...)`` those of
        ``side_weights`` are the ones in use. Queries that are being decoded cannot go on. Raises
        ``ValueError`` or ``TypeError`` for memories that do not fit the main one, and for other
        than one threshold a memory, none of them NaN.
        """
        side_weights, thresholds = list(side_weights), [float(value) for value in thresholds]
        check_memories(self.main, side_weights)
        if len(thresholds) != len(side_weights) or any(map(math.isnan, thresholds)):
            raise ValueError(
                f"thresholds are {thresholds}; one number for each of {len(side_weights)} "
                "side memories is needed"
            )
        for number in range(self._count):
            delattr(self, f"side_{number}")
        for number, side in enumerate(side_weights):
            self.register_buffer(f"side_{number}", side, persistent=False)
        self._count = len(side_weights)
        self.thresholds = torch.tensor(thresholds, dtype=torch.float32, device=self.weight.device)
        self._memories += 1
        self.routing.active = bool(side_weights)
        self.routing.last = None

    def suspended(self) -> AbstractContextManager[None]:
        """Give the main memory's output inside a ``with`` block; routes are left as they are."""
        return self.routing.suspend()

    def prompts_of(self, lengths: Sequence[int]) -> AbstractContextManager[None]:
        """Let only the first ``lengths[q]`` tokens of query ``q`` decide inside a ``with`` block.

        For sequences that hold a prompt and its answer, padded on either side or packed. Every
        forward pass in the block, other than of ``generate``, must have ``len(lengths)`` queries.
        """
        return self.routing.prompts_of(lengths)

    @property
    def last_queries(self) -> RoutedQueries | None:
        """Return what was decided last, on the device; None before the first query."""
        last = self.routing.last
        return None if last is None or last.route is None else last

    def routes(self) -> list[Route]:
        """Return the routes of the last batch of queries, one a row; empty before the first.

        With beam search every beam is a row.
        """
        last = self.last_queries
        if last is None:
            return []
        assert last.route is not None and last.gaps is not None and last.thresholds is not None
        thresholds = tuple(last.thresholds.tolist())
        return [
            Route(memory, tuple(gaps), thresholds)
            for memory, gaps in zip(last.route.tolist(), last.gaps.tolist(), strict=True)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ + b`` with the memory ``W`` of each query; ``x`` ``[..., d_in]``."""
        if not self._count or self.routing.suspended:
            return linear(x, self.main, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            # The memories stay as they are: autocast would copy each of them in every pass.
            with torch.autocast(x.device.type, enabled=False):
                return self._answer(x.to(self.weight.dtype))
        return self._answer(x)

    def _answer(self, x: Tensor) -> Tensor:
        call = self.routing.call_of(x)
        if self.training and call.decides and not torch.compiler.is_compiling():
            self.routing.recomputed.note(call, x)
        rows = call.to_rows(x)
        if call.decides:
            output = self._decide(call, rows)
        else:
            output = self._with_route(rows, self._kept_route(call))
        return call.from_rows(output, x)

    def _decide(self, call: ModelCall, x: Tensor) -> Tensor:
        """Decide the routes of a pass, note them, and return its output."""
        queries = call.queries
        mask = None if call.mask is None else call.mask.to(x.device)
        sums: GapSums | None
        if call.continues:
            if queries.sums is None or queries.memories != self._memories:
                raise ValueError(_CHANGED)
            beams = _beams(call, queries.sums.count.shape[0])
            sums = self._with_largest(queries).repeated(beams) + self._piece(x, mask)
            queries.short = None
            gaps = sums.gaps(self.reduction)
            route = choose_route(gaps, self.thresholds)
            output = self._with_route(x, route)
        else:
            output, route, gaps = self._routed(x, mask)
            sums, queries.short = None, None
            if call.may_continue:
                sums = self._first_piece(x, mask, gaps)
                queries.short = (x.detach(), mask) if sums.largest is None else None
        queries.route, queries.gaps, queries.sums = route, gaps, sums
        queries.thresholds, queries.memories = self.thresholds, self._memories
        self.routing.last = queries
        return output

    def _kept_route(self, call: ModelCall) -> Tensor:
        route = call.queries.route
        if route is None or call.queries.memories != self._memories:
            raise ValueError(_CHANGED)
        beams = _beams(call, route.shape[0])
        return route if beams == 1 else route.repeat_interleave(beams)

    def _first_piece(self, x: Tensor, mask: Tensor | None, gaps: Tensor) -> GapSums:
        largest: Tensor | None = gaps
        count = counted_tokens(x, mask)
        if self.reduction == "auto" and not all_are_long(x, mask, count):
            # It takes all products again. A compiled graph has no second chance to do that, and
            # more tokens than these are not kept.
            now = torch.compiler.is_compiling() or x.shape[1] > MEAN_UP_TO
            largest = self._gaps(x, mask, "max") if now else None
        return GapSums.of_piece(gaps, largest, count)

    def _with_largest(self, queries: RoutedQueries) -> GapSums:
        assert queries.sums is not None
        if queries.short is None:
            return queries.sums
        return replace(queries.sums, largest=self._gaps(*queries.short, "max"))

    def _piece(self, x: Tensor, mask: Tensor | None) -> GapSums:
        mean = self._gaps(x, mask, "max" if self.reduction == "max" else "mean")
        largest = self._gaps(x, mask, "max") if self.reduction == "auto" else mean
        return GapSums.of_piece(mean, largest, counted_tokens(x, mask))

    def _gaps(self, x: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
        with torch.no_grad():
            if torch.compiler.is_compiling():
                return self._operator(x, reduction, mask, None)[2]
            return activation_gap(
                x,
                self.main,
                self.side_weights,
                bias=self.bias,
                activation=self.activation,
                reduction=reduction,
                mask=mask,
            )

    def _routed(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output, the route and the gaps of queries that are new."""
        if self._needs_operator(x):
            return self._operator(x, self.reduction, mask, None)
        routed = routed_linear(
            x,
            self.main,
            self.side_weights,
            self.thresholds,
            bias=self.bias,
            activation=self.activation,
            reduction=self.reduction,
            mask=mask,
        )
        assert routed.gaps is not None
        return routed.output, routed.route, routed.gaps

    def _with_route(self, x: Tensor, route: Tensor) -> Tensor:
        route = route.to(x.device)
        if self._needs_operator(x):
            return self._operator(x, self.reduction, None, route)[0]
        return routed_linear(
            x, self.main, self.side_weights, self.thresholds, bias=self.bias, route=route
        ).output

    def _needs_operator(self, x: Tensor) -> bool:
        """Say whether ``routed_linear`` must run as an operator: inside a compiled graph, and where
        it is differentiated, since its kernels have no backward pass of their own.
        """
        return torch.compiler.is_compiling() or (
            torch.is_grad_enabled()
            and any(
                tensor is not None and tensor.requires_grad
                for tensor in (x, self.weight, self.bias, *self.side_weights)
            )
        )

    def _operator(
        self, x: Tensor, reduction: str, mask: Tensor | None, route: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return output, route and gaps; no gaps where the route is given."""
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.pyeditfast.routed_linear(
            x,
            self.main,
            self.side_weights,
            self.thresholds,
            self.bias,
            self.activation or "none",
            reduction,
            mask,
            route,
            None,
            "silu",
        )
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> WiseLinear:
        exact = self.thresholds
        super()._apply(fn, recurse)
        # A threshold rounded to 16 bits would move queries across it.
        self.thresholds = exact.to(self.thresholds.device)
        return self

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, side_memories={self._count}, "
            f"activation={self.activation!r}, reduction={self.reduction!r}"
        )


_CHANGED = (
    "the cache was filled with other side memories than the routed module has now; "
    "begin with an empty cache"
)


def _register_operator() -> None:
    # Here and not above: loading the compiler's parts takes a second.
    import pyeditfast.ops.torch_library  # noqa: F401


def _beams(call: ModelCall, queries: int) -> int:
    """Return how many rows of a pass belong to each of the queries that it goes on with."""
    beams, rest = divmod(call.rows, queries)
    if rest or not beams:
        raise ValueError(
            f"{call.rows} rows go on with {queries} queries; "
            "a multiple is needed, the rows of a query next to each other"
        )
    return beams


def install(
    model: nn.Module, module_name: str, *, activation: str | None, reduction: str
) -> WiseLinear:
    """Put a ``WiseLinear`` in the place of the module called ``module_name`` and return it.

    ``activation`` (None, ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``) and ``reduction``
    (``"mean"``, ``"max"`` or ``"auto"``) are those of the activation gap. The model's ``generate``
    keeps its signature. Raises ``UnknownModuleError`` or ``UnsupportedWeightError`` for a module
    that is not an ``nn.Linear`` or a ``Conv1D``, ``ValueError`` for a model that has a routed
    module already.
    """
    for name, module in model.named_modules():
        if isinstance(module, WiseLinear):
            raise ValueError(f"{name} is routed already; remove it before {module_name}")
    original = find_edit_modules(model, [module_name])[0].module
    assert isinstance(original, nn.Linear | Conv1D)
    routed = WiseLinear(original, activation=activation, reduction=reduction)
    _put(model, module_name, routed)
    routed.routing.attach(_root(model, module_name))
    RoutedGenerate.install(model, routed.routing)
    RoutedPrepareInputs.install(model, routed.routing)
    return routed


def remove(model: nn.Module, module_name: str) -> None:
    """Put back the module that ``install`` replaced, and the model's own ``generate``.

    Raises ``ValueError`` where no ``WiseLinear`` is called ``module_name``.
    """
    routed = dict(model.named_modules()).get(module_name)
    if not isinstance(routed, WiseLinear):
        raise ValueError(f"{module_name} is a {type(routed).__name__}, not a WiseLinear")
    routed.routing.detach()
    RoutedGenerate.remove(model)
    RoutedPrepareInputs.remove(model)
    (original,) = routed._original
    # Conversions and loading may have put other parameters into the module that stood in for it.
    original.weight = routed.weight
    original.bias = routed.bias
    original.train(routed.training)
    _put(model, module_name, original)


def find_wise_linear(model: nn.Module) -> WiseLinear | None:
    """Return the routed module of ``model``, None if it has none."""
    return next((part for part in model.modules() if isinstance(part, WiseLinear)), None)


@contextlib.contextmanager
def prompts_of(model: nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Let only the first ``lengths[q]`` tokens of query ``q`` decide its route, where ``model`` has
    a routed module; see ``WiseLinear.prompts_of``.
    """
    routed = find_wise_linear(model)
    with contextlib.nullcontext() if routed is None else routed.prompts_of(lengths):
        yield


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, label = name.rpartition(".")
    setattr(model.get_submodule(parent), label, module)


def _root(model: nn.Module, module_name: str) -> nn.Module:
    """Return the part of ``model`` that holds the list of blocks with the module: whichever way the
    model is called, it runs once.
    """
    parts = module_name.split(".")
    for place in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:place])), nn.ModuleList):
            return model.get_submodule(".".join(parts[: place - 1]))
    return model


__all__ = ["Route", "WiseLinear", "find_wise_linear", "install", "prompts_of", "remove"]


def _warn_of_side_memories(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Say once what a state dict, and so a saved model, leaves out."""
    assert isinstance(module, WiseLinear)
    if module.side_weights and not (module.routing.suspended or module._warned):
        module._warned = True
        logger.warning(
            "a state dict is that of the base model, without its %d side memories; "
            "WiseEditor.save(directory) keeps them",
            len(module.side_weights),
        )
