"""Taking back the steps of a batch that failed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyeditfast.editors.wise_config import WiseConfig
from pyeditfast.editors.wise_training import WEIGHT_DECAY
from pyeditfast.ops import random_uniform

BLOCK_ELEMENTS = 1 << 21
"""Elements whose mask exists at a time: 10 MB, whatever the size of the side memory."""


class BeforeSteps:
    """What steps with the mask of ``seed`` can change of ``side`` ``[d_out, d_in]``, as it was.

    Of a 16-bit side memory that is the part ``mask_ratio``, of a wider one all of it.
    """

    def __init__(self, side: Tensor, config: WiseConfig, seed: int) -> None:
        self._side = side
        self._seed = seed
        # What the mask leaves out decays. In 16 bits each step's decay is lost in rounding.
        decays = config.edit_lr * WEIGHT_DECAY >= torch.finfo(side.dtype).eps / 4
        self._ratio = 1.0 if decays else config.mask_ratio
        self._kept = [self._side[rows][mask] for rows, mask in self._changing()]

    def restore(self) -> None:
        """Put everything back in place."""
        for (rows, mask), kept in zip(self._changing(), self._kept, strict=True):
            self._side[rows][mask] = kept

    def _changing(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of rows and the mask of the elements that steps can change."""
        height, width = self._side.shape
        step = max(1, BLOCK_ELEMENTS // width)
        # Compared in float32, as in the steps.
        ratio = torch.tensor(self._ratio, dtype=torch.float32, device=self._side.device)
        for start in range(0, height, step):
            shape = (min(step, height - start), width)
            drawn = random_uniform(
                self._seed, shape, offset=start * width, device=self._side.device
            )
            yield slice(start, start + step), drawn < ratio
