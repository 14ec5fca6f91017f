"""A forward pass as a routed module sees it, and what is decided for its queries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyeditfast.model.gap_sums import GapSums
from pyeditfast.model.packing import PackedLayout


@dataclass(frozen=True)
class Route:
    """Where a query went: ``memory`` (−1 for the main one), its gap for each side memory, and the
    thresholds that the gaps were held against.
    """

    memory: int
    gaps: tuple[float, ...]
    thresholds: tuple[float, ...]


@dataclass
class RoutedQueries:
    """The queries of one batch and what was decided for them.

    ``route`` ``[queries]`` int64, ``gaps`` ``[queries, memories]``, ``thresholds`` ``[memories]``:
    None until decided. ``sums``: what their prompts need to go on, None where they cannot;
    ``short``: a first piece of few tokens ``[queries, columns, d_in]`` and its mask, kept where
    ``sums`` lacks the largest gaps.
    ``memories`` numbers the set of memories that was asked. ``decoding`` once a token was
    generated.
    """

    route: Tensor | None = None
    gaps: Tensor | None = None
    thresholds: Tensor | None = None
    sums: GapSums | None = None
    short: tuple[Tensor, Tensor | None] | None = None
    memories: int = -1
    decoding: bool = False

    def settle(self) -> None:
        """Copy what was decided: a replayed CUDA graph writes its results to the same place again.

        To be called outside compiled code.
        """
        self.route, self.gaps = _copied(self.route), _copied(self.gaps)
        if self.sums is not None:
            self.sums = self.sums.copied()


@dataclass
class ModelCall:
    """One forward pass as a routed module sees it.

    ``mask`` ``[queries, columns]`` bool: the tokens that decide, None where all do. With ``layout``
    the pass is one packed row. ``decides`` is False where the route is kept. ``continues`` where
    the tokens add to those of earlier passes; ``may_continue`` where later ones may add to them.
    """

    queries: RoutedQueries
    rows: int
    columns: int
    decides: bool
    mask: Tensor | None = None
    layout: PackedLayout | None = None
    continues: bool = False
    may_continue: bool = False

    @property
    def tokens(self) -> int:
        """Return the number of tokens of the pass, pads included."""
        return self.rows * self.columns if self.layout is None else self.layout.tokens

    def to_rows(self, x: Tensor) -> Tensor:
        """Return a module's input for the whole pass as ``[queries, columns, d]``."""
        if self.layout is None:
            return x.reshape(self.rows, self.columns, x.shape[-1])
        to_rows, _ = self.layout.indices(x.device)
        flat = x.reshape(-1, x.shape[-1]).index_select(0, to_rows)
        return flat.unflatten(0, (self.rows, self.columns))

    def from_rows(self, output: Tensor, like: Tensor) -> Tensor:
        """Return an output ``[queries, columns, d_out]`` in the form of the input ``like``."""
        if self.layout is not None:
            _, to_packed = self.layout.indices(output.device)
            output = output.flatten(0, 1).index_select(0, to_packed)
        return output.reshape(*like.shape[:-1], output.shape[-1])


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
