"""What an editing run did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pyeditfast.editors.wise_thresholds import Calibration


@dataclass(frozen=True, slots=True)
class Rejection:
    """An edit that was not carried out: its number in the run (from 0), prompt, target and the
    reason.
    """

    index: int
    prompt: str
    target: str
    reason: str

    def __str__(self) -> str:
        return f"edit {self.index} ({self.prompt[:60]!r} -> {self.target[:40]!r}): {self.reason}"


@dataclass
class EditReport:
    """The outcome of ``edit``.

    ``edits`` carried out in ``turns``; those ``rejected``, with reasons; ``seconds`` by phase, with
    the wall clock under ``"total"``; ``peak_memory_bytes``: allocated on the CUDA devices, or the
    process's resident set on a CPU. WISE also tells which edits were carried out but are
    ``not_routed``: their prompt alone does not reach the side memory that holds them, so that the
    model answers it as before or from another one. ``calibrations``: the threshold of each side
    memory and its expected errors, where they were calibrated.
    """

    edits: int = 0
    turns: int = 0
    rejected: list[Rejection] = field(default_factory=list)
    not_routed: list[Rejection] = field(default_factory=list)
    calibrations: list[Calibration] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0

    @property
    def edits_per_second(self) -> float:
        """Return the edits carried out per second of wall clock, 0 before any."""
        total = self.seconds.get("total", 0.0)
        return self.edits / total if total > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {**asdict(self), "edits_per_second": self.edits_per_second}

    def __str__(self) -> str:
        lines = [
            f"{counted(self.edits, 'edit')} in {counted(self.turns, 'turn')}, "
            f"{self.edits_per_second:.1f} edits/s, "
            f"{len(self.rejected)} rejected, peak memory {self.peak_memory_bytes / 2**20:.0f} MiB"
        ]
        phases = sorted(self.seconds.items(), key=lambda item: -item[1])
        lines.append(", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases))
        for label, edits in (("rejected", self.rejected), ("not routed", self.not_routed)):
            lines.extend(f"{label} {edit}" for edit in edits[:5])
            if len(edits) > 5:
                lines.append(f"... and {len(edits) - 5} more {label}")
        if self.not_routed and not self.calibrations:
            lines.append(
                "calibrated thresholds may reach more: WiseConfig(calibrate=True), --calibrate"
            )
        for number, calibration in enumerate(self.calibrations):
            lines.append(f"side memory {number}: {calibration}")
        return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    """Return ``number`` and ``noun``, which takes an s where that is needed."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
