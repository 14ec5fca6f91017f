"""Opening the model that a command names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def open_model(
    source: str, dtype: str, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and the tokenizer of a directory or hub name."""
    import torch

    from pyeditfast.loading import load_model

    path = Path(source).expanduser()
    if not path.is_dir() and (
        path.exists() or source.startswith((".", "/", "~")) or path.parts[2:]
    ):
        raise ValueError(f"{source} is not a directory with a model")
    dtypes: dict[str, torch.dtype | str] = {
        "auto": "auto",
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32": torch.float32,
    }
    if dtype not in dtypes:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(dtypes)}")
    # Absolute, because side memories are saved with the place of their base model.
    place = path.absolute() if path.is_dir() else source
    return load_model(place, dtype=dtypes[dtype], device=open_device(device))


def saved_chat_template(directory: Path) -> bool:
    """Return whether the side memories in ``directory`` were trained on prompts in the chat
    template; False where there are none.
    """
    from pyeditfast import checkpoints

    return bool(checkpoints.saved_config(directory).get("chat_template", False))


def open_device(device: str | None) -> str | None:
    """Return the device to use where ``device`` was given: a GPU if there is one.

    Raises ``ValueError`` for one that is not there.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else None
    if device == "auto":
        return device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return device
