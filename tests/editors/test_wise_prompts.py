"""The texts of WISE as tokens: contexts, targets, locality prompts."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model, tiny_tokenizer
from wise_worlds import settings

from pyeditfast import Edit
from pyeditfast.editors.wise_prompts import (
    LOCALITY_POOL,
    PromptBuilder,
    pad_token,
    sample_templates,
)

EDIT = Edit("The capital of the island is", "a harbour city")


def builder(templates=("{}",), tokenizer=None, model=None, **changes):
    tokenizer = tokenizer or tiny_tokenizer()
    model = model or tiny_model("llama")
    return PromptBuilder(model, tokenizer, settings(**changes), templates)


def test_a_sequence_is_the_filled_template_and_the_whole_target():
    tokenizer = tiny_tokenizer()
    queries = builder(["{}", "Well, {}"]).edit_queries(EDIT, "The sky is")
    target = tokenizer(" a harbour city")["input_ids"]
    for query, text in zip(
        queries.sequences,
        ["The capital of the island is", "Well, The capital of the island is"],
        strict=True,
    ):
        assert list(query.tokens) == tokenizer(text)["input_ids"] + target
        assert list(query.targets) == target


def test_the_locality_prompt_has_no_target():
    queries = builder().edit_queries(EDIT, "The sky is")
    assert list(queries.locality.tokens) == tiny_tokenizer()("The sky is")["input_ids"]
    assert queries.locality.targets == ()


def test_special_tokens_stand_before_the_prompt_alone():
    tokenizer = tiny_tokenizer(bos=True)
    queries = builder(tokenizer=tokenizer).edit_queries(EDIT, "The sky is")
    assert queries.sequences[0].tokens[0] == tokenizer.bos_token_id
    assert queries.sequences[0].tokens.count(tokenizer.bos_token_id) == 1
    assert queries.locality.tokens[0] == tokenizer.bos_token_id


def test_a_chat_template_brings_its_own_special_tokens():
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = "<bos>{% for m in messages %}{{ m['content'] }}{% endfor %} answer:"
    queries = builder(tokenizer=tokenizer, chat_template=True).edit_queries(EDIT, "The sky is")
    for query in (*queries.sequences, queries.locality):
        assert query.tokens.count(tokenizer.bos_token_id) == 1
    told = tokenizer.decode(queries.locality.tokens)
    assert told.endswith("The sky is answer:")


@pytest.mark.parametrize(
    ("edit", "locality", "reason"),
    [
        (EDIT, EDIT.prompt, "the locality prompt is the edit's own prompt"),
        (EDIT, f" {EDIT.prompt} ", "the locality prompt is the edit's own prompt"),
        (EDIT, "", "the locality prompt is empty"),
        (Edit("x" * 300, "y"), "The sky is", "exceed the model's context of 16"),
        (EDIT, "long " * 99, "exceed the model's context of 16"),
    ],
)
def test_says_why_an_edit_cannot_be_used(edit, locality, reason):
    found = builder(model=tiny_model("llama", context=16)).edit_queries(edit, locality)
    assert isinstance(found, str) and reason in found


def test_a_query_may_fill_the_context_and_no_more():
    tokenizer = tiny_tokenizer()
    length = len(tokenizer(EDIT.prompt)["input_ids"]) + len(
        tokenizer(" a harbour city")["input_ids"]
    )
    fits = builder(model=tiny_model("llama", context=length))
    assert len(fits.edit_queries(EDIT, "The sky is").sequences[0]) == length
    assert isinstance(
        builder(model=tiny_model("llama", context=length - 1)).edit_queries(EDIT, "The sky is"), str
    )


def test_a_locality_prompt_may_fill_the_context_and_no_more():
    length = len(tiny_tokenizer()("The sky " * 9)["input_ids"])
    fits = builder(model=tiny_model("llama", context=length)).prompt_query("The sky " * 9)
    assert not isinstance(fits, str) and len(fits) == length
    refused = builder(model=tiny_model("llama", context=length - 1)).prompt_query("The sky " * 9)
    assert refused == f"{length} tokens exceed the model's context of {length - 1}"


def test_locality_prompts_come_from_the_record_the_given_pool_or_the_shipped_one():
    own = Edit("a", "b", locality_prompt="The sky is")
    assert builder().locality_prompt(own, 3) == "The sky is"
    given = builder(locality_prompts=["one", "two"])
    assert [given.locality_prompt(EDIT, number) for number in range(3)] == ["one", "two", "one"]
    shipped = builder()
    assert shipped.locality_prompt(EDIT, 0) == LOCALITY_POOL[0]
    assert shipped.locality_prompt(EDIT, len(LOCALITY_POOL)) == LOCALITY_POOL[0]


def test_pads_with_a_token_that_the_tokenizer_has():
    tokenizer = tiny_tokenizer()
    assert pad_token(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert pad_token(tokenizer) == tokenizer.eos_token_id


def test_a_prompt_of_the_pool_that_is_the_edits_own_is_passed_over():
    alone = Edit(LOCALITY_POOL[3], "cold")
    assert builder().locality_prompt(alone, 3) == LOCALITY_POOL[4]
    last = Edit(LOCALITY_POOL[-1], "hot")
    assert builder().locality_prompt(last, len(LOCALITY_POOL) - 1) == LOCALITY_POOL[0]
    # What the record brings stands.
    own = Edit("The sky is", "green", locality_prompt="The sky is")
    assert builder().locality_prompt(own, 0) == "The sky is"


def test_contexts_do_not_depend_on_the_models_settings_of_generate(caplog):
    plain, set_up = tiny_model("llama"), tiny_model("llama")
    own = set_up.generation_config
    own.update(max_length=100, num_beams=2, num_return_sequences=2, return_dict_in_generate=True)
    templates = [sample_templates(model, tiny_tokenizer(), 3) for model in (plain, set_up)]
    assert templates[0] == templates[1]
    assert set_up.generation_config is own
    assert not caplog.records


def test_contexts_need_no_token_types():
    plain, typed = tiny_tokenizer(), tiny_tokenizer()
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    model = tiny_model("llama")
    assert sample_templates(model, typed, 3) == sample_templates(model, plain, 3)
