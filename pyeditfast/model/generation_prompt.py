"""What a routed module has to know of a model's ``generate``: which columns are the prompt.

Neither a forward pass nor a cache tells: with a static cache the attention mask arrives in four
dimensions, without a cache every step passes the whole row again, and assisted decoding passes
candidates together with the prompt. ``generate`` knows, and ``prepare_inputs_for_generation`` is
called before each of its forward passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from pyeditfast.model.model_call import RoutedQueries
    from pyeditfast.model.query_routing import QueryRouting


@dataclass
class GenerationPrompt:
    """The prompt of one call of ``generate``.

    ``columns`` of a row are the prompt, ``seen`` of them have passed; ``complete`` once all have.
    ``cache_outlives``: the caller keeps the cache and may go on with it. ``assists``: another
    model's generation asks this one for candidates, so that what it passes after the first call
    was generated.
    """

    columns: int
    cache_outlives: bool
    assists: bool
    seen: int = 0
    complete: bool = False
    queries: RoutedQueries | None = None


@dataclass
class PreparedCall:
    """A forward pass that ``generate`` is about to make; ``attention_mask`` ``[rows, columns]`` of
    the cached columns and its own, None where every token counts.
    """

    prompt: GenerationPrompt
    attention_mask: Tensor | None


class _RoutedMethod:
    """A method of one model, called with the routing informed.

    A class and not a function, so that a copy of the model gets a method of the copy.
    """

    name: str

    def __init__(self, model: nn.Module, routing: QueryRouting) -> None:
        self._model = model
        self._routing = routing
        self._previous: Callable[..., Any] | None = vars(model).get(self.name)
        self.__doc__ = self.__wrapped__.__doc__

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Return the method as it was; ``inspect.signature`` asks for it."""
        if self._previous is not None:
            return self._previous
        method: Callable[..., Any] = getattr(type(self._model), self.name).__get__(self._model)
        return method

    @classmethod
    def install(cls, model: nn.Module, routing: QueryRouting) -> None:
        """Put the method into the model's instance, if the model has one of that name."""
        if hasattr(model, cls.name):
            vars(model)[cls.name] = cls(model, routing)

    @classmethod
    def remove(cls, model: nn.Module) -> None:
        """Put back what was there before."""
        ours = vars(model).get(cls.name)
        if not isinstance(ours, cls):
            return
        if ours._previous is None:
            del vars(model)[cls.name]
        else:
            vars(model)[cls.name] = ours._previous


class RoutedGenerate(_RoutedMethod):
    """``model.generate``: every call is a new query, or goes on with the queries of its cache."""

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        prompt = self._prompt(*args, **kwargs)
        outer, self._routing.prompt = self._routing.prompt, prompt
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            self._routing.prompt = outer

    def _prompt(
        self, inputs: Any = None, generation_config: Any = None, *_: Any, **options: Any
    ) -> GenerationPrompt:
        config = generation_config or getattr(self._model, "generation_config", None)
        returns_cache = options.get("return_dict_in_generate")
        if returns_cache is None:
            returns_cache = getattr(config, "return_dict_in_generate", None)
        return GenerationPrompt(
            columns=_prompt_columns(inputs, options),
            cache_outlives=bool(returns_cache) or options.get("past_key_values") is not None,
            assists=bool(getattr(generation_config, "is_assistant", False)),
        )


class RoutedPrepareInputs(_RoutedMethod):
    """``model.prepare_inputs_for_generation``: tells the routing of the forward pass to come."""

    name = "prepare_inputs_for_generation"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._routing.prepare(kwargs.get("attention_mask"))
        return self.__wrapped__(*args, **kwargs)


def _prompt_columns(inputs: Any, options: dict[str, Any]) -> int:
    """Return the columns of the prompt, those in the cache included.

    With a filled cache the ids may be the new ones alone; the attention mask always covers all.
    Without any input ``generate`` begins with one token of its own.
    """
    for given in (
        options.get("attention_mask"),
        options.get("inputs_embeds"),
        inputs,
        options.get("input_ids"),
    ):
        if given is not None:
            return int(given.shape[1])
    return 1
