"""From the options of ``pyeditfast edit`` to the settings of its method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pyeditfast.cli.options import check_method

if TYPE_CHECKING:
    from pyeditfast.editors import UltraEditConfig
    from pyeditfast.editors.wise_config import WiseConfig

    Config: TypeAlias = UltraEditConfig | WiseConfig

FLAGS = {"retrieve": "--no-retrieve", "templates": "--template"}
"""Options that are not called as the setting is."""

NONE = "none"
"""What a person types for a setting of None."""


def edit_settings(
    method: str,
    preset: str | None,
    modules: Sequence[str] | None,
    seed: int | None,
    own: Mapping[str, Mapping[str, Any]],
) -> tuple[Config, set[str]]:
    """Return the settings of ``method`` and the names of those that were asked for.

    ``own``: by method, the options that belong to it alone, None where not given. Raises
    ``ValueError`` for one that belongs to the other method.
    """
    check_method(method)
    for other, options in own.items():
        for name, value in options.items():
            if other != method and value is not None:
                flag = FLAGS.get(name, "--" + name.replace("_", "-"))
                raise ValueError(f"{flag} belongs to --method {other}")
    given = {name: value for name, value in own[method].items() if value is not None}
    if seed is not None:
        given["seed"] = seed
    return (_wise if method == "wise" else _ultraedit)(preset, modules, given)


def _ultraedit(
    preset: str | None, modules: Sequence[str] | None, given: dict[str, Any]
) -> tuple[UltraEditConfig, set[str]]:
    from pyeditfast.editors import UltraEditConfig

    if modules:
        given["edit_modules"] = tuple(modules)
    if preset is None:
        return UltraEditConfig(**given), set(given)
    return UltraEditConfig.preset(preset, **given), {*given, "edit_modules"}


def _wise(
    preset: str | None, modules: Sequence[str] | None, given: dict[str, Any]
) -> tuple[WiseConfig, set[str]]:
    from pyeditfast.editors.presets import wise_preset
    from pyeditfast.editors.wise_config import WiseConfig

    if modules:
        if len(modules) > 1:
            raise ValueError(f"--module is given {len(modules)} times; WISE edits one module")
        given["edit_module"] = modules[0]
    if given.get("activation") == NONE:
        given["activation"] = None
    if "norm_constraint" in given:
        given["norm_constraint"] = _number_or_none("--norm-constraint", given["norm_constraint"])
    if "locality_prompts" in given:
        given["locality_prompts"] = _lines(given["locality_prompts"])
    if preset is None:
        return WiseConfig(**given), set(given)
    return WiseConfig.preset(preset, **given), {*given, *wise_preset(preset)}


def _number_or_none(flag: str, text: str) -> float | None:
    if text == NONE:
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{flag} is {text!r}; a number or none is needed") from None


def _lines(path: Path) -> tuple[str, ...]:
    lines = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if not lines:
        raise ValueError(f"--locality-prompts {path}: the file holds no prompt")
    return lines
