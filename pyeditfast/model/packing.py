"""All sequences of a pass in one row, without padding; only the attention pads again.

Transformers lets a package register an attention function. Ours gets ``q``, ``k``, ``v`` of the
packed row ``[1, heads, tokens, head_dim]``, lays the sequences out as rows padded on the right, and
runs causal attention: under a causal mask, padding on the right needs no mask at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

ATTENTION_NAME = "pyeditfast_packed"


class PackingUnsupportedError(Exception):
    """A model's attention asks for something that the packed form does not do."""


class PackedLayout:
    """Where each sequence of a packed row lies.

    ``lengths`` are the tokens of the sequences, in order. ``read`` tells of attention modules at
    which slots ``[n]``, ascending, their output is read; of others it is read everywhere. Index
    tensors are kept per device, since a model may be spread over several.
    """

    def __init__(
        self, lengths: Sequence[int], read: Mapping[nn.Module, Tensor] | None = None
    ) -> None:
        self.lengths = list(lengths)
        self.longest = max(self.lengths)
        self.read = dict(read or {})
        self._indices: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._read_indices: dict[tuple[nn.Module, torch.device], ReadIndices] = {}

    @property
    def tokens(self) -> int:
        """Return the number of tokens of the row."""
        return sum(self.lengths)

    def positions(self) -> Tensor:
        """Return the position of each token in its own sequence, ``[tokens]`` int64."""
        return torch.cat([torch.arange(length) for length in self.lengths])

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ``to_rows`` ``[sequences · longest]`` and ``to_packed`` ``[tokens]``, int64.

        A pad slot reads the last token of its own sequence, so that a NaN never crosses to a
        neighbour.
        """
        if device not in self._indices:
            lengths = torch.tensor(self.lengths)
            starts = lengths.cumsum(0) - lengths
            slots = torch.arange(self.longest)
            to_rows = starts[:, None] + torch.minimum(slots[None, :], lengths[:, None] - 1)
            real = slots[None, :] < lengths[:, None]
            to_packed = real.flatten().nonzero().squeeze(1)
            self._indices[device] = (to_rows.flatten().to(device), to_packed.to(device))
        return self._indices[device]

    def read_indices(self, module: nn.Module, device: torch.device) -> ReadIndices:
        """Return where the output of ``module`` is read, sequence by sequence."""
        if (module, device) not in self._read_indices:
            found = _read_indices(self.lengths, self.read[module].cpu())
            self._read_indices[module, device] = found.to(device)
        return self._read_indices[module, device]


@dataclass(frozen=True)
class ReadIndices:
    """Slots of a packed row at which something is read, as rows.

    ``slots`` ``[n]``; ``to_rows`` ``[sequences · most]`` are the slots of each sequence, its last
    token where it has fewer than ``most``; ``to_slots`` ``[n]`` leads back. ``mask`` ``[sequences,
    1, most, longest]``: what a causal attention lets each of them see.
    """

    slots: Tensor
    to_rows: Tensor
    to_slots: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> ReadIndices:
        """Return the indices on ``device``."""
        return ReadIndices(
            *(part.to(device) for part in (self.slots, self.to_rows, self.to_slots, self.mask))
        )


def _read_indices(lengths: Sequence[int], slots: Tensor) -> ReadIndices:
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    sequence = torch.bucketize(slots, ends, right=True)
    counts = torch.bincount(sequence, minlength=len(lengths))
    most = int(counts.max())
    place = torch.arange(len(slots)) - (counts.cumsum(0) - counts)[sequence]
    to_rows = (ends - 1)[:, None].repeat(1, most)
    to_rows[sequence, place] = slots
    positions = to_rows - (ends - sizes)[:, None]
    mask = torch.arange(max(lengths)) <= positions[:, :, None]
    return ReadIndices(slots, to_rows.flatten(), sequence * most + place, mask.unsqueeze(1))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_layout: PackedLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a packed row.

    ``query`` ``[1, heads, tokens, head_dim]``, ``key`` and ``value`` with possibly fewer heads;
    returns ``[1, tokens, heads, head_dim]``, 0 where the layout says that it is not read. The
    signature is Transformers' (hence ``options``, which other attention functions need). Raises
    ``PackingUnsupportedError`` for what a causal mask alone cannot express.
    """
    if packed_layout is None:
        raise PackingUnsupportedError("its layers do not pass keyword arguments to the attention")
    if sliding_window is not None and sliding_window < packed_layout.longest:
        raise PackingUnsupportedError(
            f"its sliding window of {sliding_window} is shorter than a prompt"
        )
    if softcap is not None:
        raise PackingUnsupportedError("its attention is soft-capped")
    if is_causal is False:
        raise PackingUnsupportedError("its attention is not causal")
    for name in ("s_aux", "position_bias"):
        if options.get(name) is not None:
            raise PackingUnsupportedError(f"its attention takes {name}")
    if (
        query.shape[0] != 1
        or query.shape[2] != packed_layout.tokens
        or key.shape[2] != query.shape[2]
    ):
        raise PackingUnsupportedError(
            f"its attention reshapes the packed row to {tuple(query.shape)}"
        )
    to_rows, to_packed = packed_layout.indices(query.device)
    read = (
        packed_layout.read_indices(module, query.device) if module in packed_layout.read else None
    )

    def rows(packed: Tensor, index: Tensor) -> Tensor:
        # [1, heads, tokens, head_dim] -> [sequences, heads, slots of one, head_dim]
        laid_out = packed[0].transpose(0, 1).index_select(0, index)
        return laid_out.unflatten(0, (len(packed_layout.lengths), -1)).transpose(1, 2)

    attended = scaled_dot_product_attention(
        rows(query, to_rows if read is None else read.to_rows),
        rows(key, to_rows),
        rows(value, to_rows),
        attn_mask=None if read is None else read.mask,
        dropout_p=dropout,
        is_causal=read is None,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    attended = attended.transpose(1, 2).flatten(0, 1)
    if read is None:
        return attended.index_select(0, to_packed).unsqueeze(0), None
    everywhere = attended.new_zeros(packed_layout.tokens, *attended.shape[1:])
    where_read = attended.index_select(0, read.to_slots)
    return everywhere.index_copy(0, read.slots, where_read).unsqueeze(0), None


@contextlib.contextmanager
def packed_attention_enabled(configs: Sequence[Any]) -> Iterator[None]:
    """Let a model of ``configs`` dispatch its attention to ``packed_attention`` inside a ``with``
    block, then restore its own.
    """
    # Transformers makes no mask for an attention that has no mask function of its name.
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    previous = [config._attn_implementation_internal for config in configs]
    try:
        # The private attribute, because the public setter has no way back for composite models that
        # mix implementations.
        for config in configs:
            config._attn_implementation_internal = ATTENTION_NAME
        yield
    finally:
        for config, implementation in zip(configs, previous, strict=True):
            config._attn_implementation_internal = implementation


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """Return every configuration in a model that names an attention."""
    found = {id(model.config): model.config}
    for submodule in model.modules():
        config = getattr(submodule, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


def packing_refused(model: PreTrainedModel) -> str | None:
    """Return why ``model`` cannot be packed as far as its class tells, None if it may be."""
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use Transformers' attention interface"
    return None
