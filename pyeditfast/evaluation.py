"""Scores of an edited model, teacher-forced as published."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyeditfast.data.edit import Edit
from pyeditfast.model.capture import frozen
from pyeditfast.model.passes import longest_first
from pyeditfast.model.query_routing import Route
from pyeditfast.model.runner import ModelRunner
from pyeditfast.model.sequences import AnswerSequence, build_sequences, context_length
from pyeditfast.model.wise_linear import find_wise_linear, prompts_of
from pyeditfast.routing_scores import RoutingScores, RoutingTally

BLOCK = 256
"""Edits scored together, so that a stream of millions needs constant memory."""

KINDS = ("efficacy", "generalization", "specificity", "portability")


@dataclass(frozen=True)
class Scores:
    """Mean scores in [0, 1] of the edits seen; None where no edit has a probe of that kind.

    ``efficacy``: the edited prompt; ``generalization``: its rephrasing; ``specificity``: the
    locality prompt, against its own answer; ``portability``: the mean over all portability probes.
    Each is the share of target tokens that are the model's first choice given the ones before (a
    fact's mean over its tokens, then the mean over facts). ``exact`` (with ``exact=True``): the
    share of facts that greedy generation answers token for token. ``counts``: facts scored of each
    kind; ``skipped``: probes that could not be tokenized or exceed the context. ``routing``: which
    prompts went to a side memory, None for a model without side memories.
    """

    efficacy: float | None = None
    generalization: float | None = None
    specificity: float | None = None
    portability: float | None = None
    exact: dict[str, float] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    routing: RoutingScores | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the scores as JSON-ready values."""
        routing = None if self.routing is None else self.routing.to_dict()
        return {**asdict(self), "routing": routing}

    def __str__(self) -> str:
        parts = []
        for kind in KINDS:
            score = getattr(self, kind)
            if score is not None:
                exact = f" (exact {self.exact[kind]:.3f})" if self.exact else ""
                parts.append(f"{kind} {score:.3f}{exact}")
        told = ", ".join(parts) or "nothing to score"
        return told if self.routing is None else f"{told}\n{self.routing}"


@dataclass(frozen=True, slots=True)
class Answer:
    """``accuracy``: the share of right target tokens; ``exact``: whether all are right, which means
    that greedy decoding gives the target: it conditions each token on the ones before, as the
    teacher-forced pass does. ``route``: that of the prompt, None without side memories.
    """

    accuracy: float
    exact: bool
    route: Route | None


def probes(edit: Edit) -> Iterator[tuple[str, str, str]]:
    """Yield ``(kind, prompt, target)`` for everything that an edit lets one score."""
    yield "efficacy", edit.prompt, edit.target
    if edit.rephrase is not None:
        yield "generalization", edit.rephrase, edit.target
    if edit.locality_prompt is not None and edit.locality_target is not None:
        yield "specificity", edit.locality_prompt, edit.locality_target
    for probe in edit.portability:
        yield "portability", probe.prompt, probe.target


def answer_accuracy(runner: ModelRunner, sequences: list[AnswerSequence]) -> dict[int, Answer]:
    """Return the answer to each sequence by the sequence's index.

    The tokens of the prompt alone decide its route, as in generation.
    """
    routed = find_wise_linear(runner.model)

    def run(current: list[AnswerSequence]) -> tuple[list[bool], list[Route]]:
        batch = runner.batch(current)
        with prompts_of(runner.model, [sequence.first_answer + 1 for sequence in current]):
            chosen = runner.answer_logits(batch).argmax(-1)
        right: list[bool] = (chosen.cpu() == batch.targets).tolist()
        return right, [] if routed is None else routed.routes()

    outcome = {}
    with frozen(runner.model), torch.inference_mode():
        for current, (right, routes) in runner.run_in_passes(longest_first(sequences), run):
            marks = iter(right)
            for sequence, route in itertools.zip_longest(current, routes):
                own = list(itertools.islice(marks, len(sequence.targets)))
                outcome[sequence.index] = Answer(sum(own) / len(own), all(own), route)
    return outcome


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Iterable[Edit],
    *,
    exact: bool = False,
    chat_template: bool = False,
    tokens_per_pass: int | None = None,
    progress: bool = False,
) -> Scores:
    """Score ``model`` on ``edits`` and return ``Scores``.

    Teacher-forced token accuracy, as published; with ``exact`` also the share of exact greedy
    answers. ``edits`` may be any iterable and is read as it goes. ``chat_template`` puts prompts
    into the tokenizer's chat template. ``tokens_per_pass``: None chooses by free memory. The model
    is not changed. For a model with side memories the routes of the prompts are scored too.
    """
    runner = ModelRunner(model, tokens_per_pass=tokens_per_pass)
    limit = context_length(model)
    sums = dict.fromkeys(KINDS, 0.0)
    exacts = dict.fromkeys(KINDS, 0)
    counts = dict.fromkeys(KINDS, 0)
    skipped = 0
    routing = RoutingTally(KINDS)
    stream = iter(edits)
    with tqdm(unit="edit", desc="evaluate", disable=not progress) as bar:
        while block := list(itertools.islice(stream, BLOCK)):
            asked = [probe for edit in block for probe in probes(edit)]
            pairs = [(prompt, target) for _, prompt, target in asked]
            if chat_template:
                pairs = [(_as_chat(tokenizer, prompt), target) for prompt, target in pairs]
            built = build_sequences(tokenizer, pairs, limit, special_tokens=not chat_template)
            usable = [sequence for sequence in built if isinstance(sequence, AnswerSequence)]
            skipped += len(built) - len(usable)
            for index, answer in sorted(answer_accuracy(runner, usable).items()):
                kind = asked[index][0]
                sums[kind] += answer.accuracy
                exacts[kind] += answer.exact
                counts[kind] += 1
                if answer.route is not None:
                    routing.add(kind, answer.route)
            bar.update(len(block))
    means = {kind: sums[kind] / counts[kind] for kind in KINDS if counts[kind]}
    shares = {kind: exacts[kind] / counts[kind] for kind in KINDS if counts[kind]}
    return Scores(
        **means,
        exact=shares if exact else None,
        counts=counts,
        skipped=skipped,
        routing=routing.scores(),
    )


def _as_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    if not prompt.strip():
        return prompt
    message = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
