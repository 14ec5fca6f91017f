"""A small Llama and its tokenizer, trained on the statements of a world and kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from pyeditfast.checkpoints import load_model
from pyeditfast.data.edit import Probe
from pyeditfast.demo.threads import QuickerThreads
from pyeditfast.demo.world import World

RECIPE = 1
"""Raised when the code below would train another model from the same settings."""

RECORD_FILE = "training.json"
END = "<end>"
CONTEXT = 128
IGNORED_LABEL = -100
BATCHES_SORTED_TOGETHER = 16


@dataclass(frozen=True)
class TrainingSettings:
    """The shape of the model and how it is trained.

    ``hidden`` to ``vocabulary`` are the Llama's sizes, about 4.5M float32 parameters as given.
    ``initial_spread`` is the standard deviation of the weights at first: at Llama's usual 0.02 a
    model this narrow needs three times the passes. ``passes`` over the statements in batches of
    ``batch``, AdamW with ``weight_decay`` and a learning rate that rises over the first twentieth
    of the steps to ``lr`` and falls as a cosine. Raises ``ValueError`` for numbers that make no
    model.
    """

    hidden: int = 192
    layers: int = 4
    heads: int = 4
    intermediate: int = 1536
    vocabulary: int = 2048
    initial_spread: float = 0.05
    passes: int = 9
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; a number above 0 is needed")
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden {self.hidden} is no multiple of twice the {self.heads} heads")
        if self.vocabulary < 257:
            raise ValueError(f"vocabulary is {self.vocabulary}; 256 bytes and the end need 257")


def trained_model(
    cache_dir: Path,
    seed: int = 0,
    *,
    world: World | None = None,
    training: TrainingSettings | None = None,
    print_line: Callable[[str], None] = print,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and tokenizer of a world, trained now or read from ``cache_dir``.

    ``world`` defaults to that of ``seed``; the same seed starts the training. The model lies in a
    folder of its own, named by a digest of everything that it follows from, which appears only when
    it is whole: an interrupted training leaves no half model. Both ways the returned model is read
    from there, so they give the same bits.
    """
    world = world if world is not None else World(seed)
    training = training if training is not None else TrainingSettings()
    folder = cached_folder(cache_dir, seed, world, training)
    if folder.is_dir():
        print_line(f"The trained model is at hand in {folder}")
    else:
        print_line(f"Training a Llama on it (once; it is kept in {folder})")
        cache_dir.mkdir(parents=True, exist_ok=True)
        _train_into(folder, seed, world, training, print_line)
    model, tokenizer = load_model(folder)
    return model.eval(), tokenizer


def cached_folder(cache_dir: Path, seed: int, world: World, training: TrainingSettings) -> Path:
    """Return where ``trained_model`` keeps the model of these settings."""
    origin = {
        "recipe": RECIPE,
        "seed": seed,
        "world": world.to_dict(),
        "training": asdict(training),
    }
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    return cache_dir / f"world-{world.seed}-{digest[:12]}"


def _train_into(
    folder: Path,
    seed: int,
    world: World,
    training: TrainingSettings,
    print_line: Callable[[str], None],
) -> None:
    statements = world.statements()
    start = time.perf_counter()
    tokenizer = train_tokenizer(statements, training.vocabulary)
    model, losses = train_model(statements, tokenizer, training, seed, print_line)
    record = {
        "seed": seed,
        "settings": asdict(training),
        "statements": len(statements),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": losses,
        "seconds": time.perf_counter() - start,
    }
    staging = Path(tempfile.mkdtemp(prefix=".training-", dir=folder.parent))
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
        staging.chmod(0o755)
        try:
            os.rename(staging, folder)
        except OSError:
            # Another process has trained the same model in the meantime; its folder is as good.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def training_record(folder: Path) -> dict[str, object]:
    """Return what was noted when the model in ``folder`` was trained: settings, losses, seconds."""
    record: dict[str, object] = json.loads((folder / RECORD_FILE).read_text())
    return record


def train_tokenizer(statements: Sequence[Probe], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most ``vocabulary`` tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator((f"{s.prompt} {s.target}." for s in statements), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=END,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=CONTEXT,
    )


def train_model(
    statements: Sequence[Probe],
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainingSettings,
    seed: int,
    print_line: Callable[[str], None] = print,
) -> tuple[LlamaForCausalLM, list[float]]:
    """Return a Llama trained to complete ``statements``, and the mean loss of each pass.

    The loss is the cross-entropy of the answer, the full stop and the end. The same arguments give
    the same bits on the same machine and number of threads. The caller's random state is left as it
    was.
    """
    rows = _tokenized(statements, tokenizer)
    model = _new_model(tokenizer, settings, seed)
    optimizer = _optimizer(model, settings)
    draw = torch.Generator().manual_seed(seed)
    steps = settings.passes * math.ceil(len(rows) / settings.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    losses = []
    start = time.perf_counter()
    model.train()
    with QuickerThreads() as threads:
        for number in range(1, settings.passes + 1):
            total = 0.0
            batches = list(_batches(rows, settings.batch, draw))
            for input_ids, labels in batches:
                with threads.step():
                    loss = _answer_loss(model, input_ids, labels)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    total += loss.item()
            losses.append(total / len(batches))
            left = (time.perf_counter() - start) * (settings.passes - number) / number
            print_line(
                f"  pass {number} of {settings.passes}: loss {losses[-1]:.3f}, {left:.0f} s left"
            )
    return model.eval(), losses


def _tokenized(
    statements: Sequence[Probe], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Return input ids and labels of each statement; the prompt has no labels."""
    prompts = tokenizer([statement.prompt for statement in statements])["input_ids"]
    answers = tokenizer([f" {statement.target}." for statement in statements])["input_ids"]
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        told = [*answer, tokenizer.eos_token_id]
        rows.append(([*prompt, *told], [IGNORED_LABEL] * len(prompt) + told))
    return rows


def _new_model(
    tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings, seed: int
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=CONTEXT,
        initializer_range=settings.initial_spread,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def _optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves the norms' gains alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)


def _rate(step: int, steps: int) -> float:
    """Return the learning rate's factor: a linear rise, then half a cosine down to a fiftieth."""
    rise = max(1.0, steps / 20)
    if step < rise:
        return min(1.0, (step + 1) / rise)
    fall = 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))
    return 0.02 + 0.98 * fall


def _batches(
    rows: Sequence[tuple[list[int], list[int]]], size: int, draw: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one pass over ``rows`` as input ids and labels ``[batch, tokens]``, in random order.

    Neighbours in a random order are sorted by length before they are cut, which leaves little to
    pad.
    """
    order = torch.randperm(len(rows), generator=draw).tolist()
    batches = []
    for start in range(0, len(order), size * BATCHES_SORTED_TOGETHER):
        near = order[start : start + size * BATCHES_SORTED_TOGETHER]
        near.sort(key=lambda i: len(rows[i][0]))
        batches += [near[i : i + size] for i in range(0, len(near), size)]
    for number in torch.randperm(len(batches), generator=draw).tolist():
        chosen = [rows[i] for i in batches[number]]
        yield (
            _padded([input_ids for input_ids, _ in chosen], 0),
            _padded([labels for _, labels in chosen], IGNORED_LABEL),
        )


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def _answer_loss(model: LlamaForCausalLM, input_ids: Tensor, labels: Tensor) -> Tensor:
    # Padding on the right needs no mask under causal attention, and logits are needed where there
    # are labels only.
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    following = labels[:, 1:]
    told = following != IGNORED_LABEL
    return nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][told]), following[told])
