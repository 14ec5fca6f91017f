"""Opening any model: plain, edited, or one with side memories."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyeditfast import checkpoints


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the causal language model and the tokenizer of a directory or hub name.

    A directory written by ``WiseEditor.save`` gives its base model with the side memories in place,
    ready for ``generate``. ``dtype="auto"`` keeps the dtype of the files. ``device``: None leaves
    the model on the CPU, ``"auto"`` spreads it over all devices (this needs the package
    accelerate), any other names one device. No remote code is run.
    """
    if checkpoints.saved_method(Path(source)) == "wise":
        from pyeditfast.editors.wise import WiseEditor

        editor = WiseEditor.load(source, dtype=dtype, device=device)
        return editor.model, editor.tokenizer
    return checkpoints.load_model(source, dtype=dtype, device=device)
