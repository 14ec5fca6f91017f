"""WISE's steps as one CUDA graph."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch

logger = logging.getLogger(__name__)

STEPS_BEFORE_CAPTURE = 2
"""Libraries set themselves up in the first steps, which a capture does not allow."""


class StepGraphs:
    """Captures and replays the steps of one model.

    A model that cannot be captured takes its steps one by one from then on, which is said once.
    """

    def __init__(self) -> None:
        self.refused = False

    @contextlib.contextmanager
    def replayed(self, step: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """Give a function that takes ``step``: run as it is at first, then as one CUDA graph."""
        taken = 0
        graph: torch.cuda.CUDAGraph | None = None
        stream = torch.cuda.Stream()

        def take() -> None:
            nonlocal taken, graph
            if taken == STEPS_BEFORE_CAPTURE and not self.refused:
                graph = self._captured(step, stream)
            taken += 1
            if graph is not None:
                graph.replay()
            elif self.refused:
                step()
            else:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    step()
                torch.cuda.current_stream().wait_stream(stream)

        yield take

    def _captured(
        self, step: Callable[[], None], stream: torch.cuda.Stream
    ) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                step()
        except RuntimeError as refusal:
            torch.cuda.synchronize()
            self.refused = True
            reason = str(refusal).splitlines()[0]
            logger.warning("WISE's steps run one by one, not as a CUDA graph: %s", reason)
            return None
        return graph
