"""Which fields of a request's body pass, which are honoured, and which are refused by name."""

import json
from pathlib import Path

import pytest

from executor.errors import JobError
from executor.job.fields import CHAT, COMPLETIONS, checked_fields, sampling_params

DATA = Path(__file__).parents[1] / "data"

# Sent by clients of OpenAI's API, vLLM, SGLang and litellm with every request.
NEUTRAL = {
    "n": [1, 1.0, None],
    "best_of": [1],
    "stream": [False],
    "stream_options": [{"include_usage": 1}],
    "repetition_penalty": [1, 1.0],
    "presence_penalty": [0, 0.0],
    "frequency_penalty": [0],
    "logit_bias": [{}, {"50": 0}],
    "response_format": [{"type": "text"}, None],
    "service_tier": ["auto", "flex"],
    "tools": [None, []],
    "tool_choice": ["none", "auto", None],
    "functions": [[]],
    "parallel_tool_calls": [True, False],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True, False],
    "include_stop_str_in_output": [False],
    "length_penalty": [1.0],
    "use_beam_search": [False],
    "early_stopping": [False],
    "min_tokens": [0],
    "bad_words": [[]],
    "allowed_token_ids": [None],
    "echo": [False],
    "suffix": [None, ""],
    "logprobs": [False, None],
    "top_logprobs": [0, None],
    "prompt_logprobs": [None],
    "modalities": [["text"]],
    "store": [True],
    "metadata": [{"a": "b"}],
    "user": ["me"],
    "safety_identifier": ["x"],
    "prompt_cache_key": ["k"],
    "priority": [0],
    "guided_json": [None],
    "guided_choice": [None],
    "structured_outputs": [None],
    "truncate_prompt_tokens": [None],
    "reasoning_effort": [None],
    "verbosity": [None, "medium"],
    "mm_processor_kwargs": [None],
    "continue_final_message": [False],
    "include_reasoning": [True],
    "chat_template": [None],
    "return_token_ids": [None, False],
    "whatever_comes": [None],
}

ASKS_FOR_MORE = {
    "n": [2, True],
    "best_of": [3],
    "stream": [True, 0],
    "repetition_penalty": [1.1, True],
    "presence_penalty": [0.5, False],
    "logit_bias": [{"5": -1}],
    "response_format": [{"type": "json_object"}, "text"],
    "tools": [[{"type": "function"}]],
    "tool_choice": ["required"],
    "skip_special_tokens": [False],
    "logprobs": [5, 1],
    "include_stop_str_in_output": [True],
    "top_logprobs": [3],
    "prompt_logprobs": [1],
    "min_tokens": [4],
    "bad_words": [["x"]],
    "guided_json": [{}],
    "echo": [True],
    "truncate_prompt_tokens": [10],
    "reasoning_effort": ["high"],
    "modalities": [["audio"]],
    "continue_final_message": [True],
    "chat_template": ["{{ 1 }}"],
    "beams": [4],
}


def each(table):
    return [(key, value) for key, values in table.items() for value in values]


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("key", "value"), each(NEUTRAL))
def test_what_changes_nothing_passes(url, key, value):
    assert checked_fields({key: value, "max_tokens": 3}, url) == {"max_tokens": 3}


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("key", "value"), each(ASKS_FOR_MORE))
def test_what_is_not_done_is_refused_by_name(url, key, value):
    with pytest.raises(JobError, match=f"body: {key} is "):
        checked_fields({key: value}, url)


@pytest.mark.parametrize(("key", "value"), [("typical_p", 0.9), ("top_a", 0.3)])
def test_what_leaves_the_most_probable_token_passes_where_it_is_taken(key, value):
    assert checked_fields({key: value, "temperature": 0}, CHAT) == {"temperature": 0}
    for temperature in (0.5, None, False):
        with pytest.raises(JobError, match=key):
            checked_fields({key: value, "temperature": temperature}, CHAT)


@pytest.mark.parametrize(
    ("key", "value"), [("typical_p", 2), ("top_k", -7), ("top_k", True), ("min_p", 2), ("min_p", True)]
)
def test_nonsense_is_refused_though_it_changed_nothing(key, value):
    with pytest.raises(JobError, match=key):
        sampling_params(checked_fields({key: value, "temperature": 0}, COMPLETIONS), 0)


def test_what_a_request_gives_counts_before_the_models_defaults():
    defaults = {"temperature": 0.6, "top_k": 20, "min_p": 0.1}
    given = checked_fields({"top_k": 5.0, "temperature": None, "min_p": 0}, CHAT)
    params = sampling_params(given, 0, defaults)
    assert (params.temperature, params.top_k, params.min_p, params.top_p) == (0.6, 5, 0, 1)
    for off in (-1, 0):
        assert sampling_params(checked_fields({"top_k": off}, CHAT), 0, defaults).top_k == off


def test_a_field_of_the_other_url_is_told():
    with pytest.raises(JobError, match=r"body: messages .* field of /v1/chat/completions"):
        checked_fields({"messages": []}, COMPLETIONS)
    with pytest.raises(JobError, match=r"body: prompt .* field of /v1/completions"):
        checked_fields({"prompt": "a"}, CHAT)


def test_log_probabilities_of_the_chosen_tokens_alone_are_honoured():
    for url, asked, refused in ((COMPLETIONS, 0, True), (CHAT, True, 0)):
        fields = checked_fields({"logprobs": asked, "top_logprobs": 0}, url)
        assert sampling_params(fields, 0).logprobs is True
        with pytest.raises(JobError, match=f"body: logprobs .*must be {json.dumps(asked)} or false or null"):
            checked_fields({"logprobs": refused}, url)
        assert not sampling_params(checked_fields({"logprobs": False}, url), 0).logprobs


def test_numbers_without_a_fraction_are_integers():
    fields = checked_fields(
        {"max_tokens": 8.0, "seed": 3.0, "stop_token_ids": [4.0], "prompt": [5.0, 6], "temperature": 1.0}, COMPLETIONS
    )
    assert json.dumps(fields["prompt"]) == "[5, 6]"
    params = sampling_params(fields, 0)
    assert (params.max_tokens, params.seed, params.stop_token_ids) == (8, 3, (4,))
    assert all(type(value) is int for value in (params.max_tokens, params.seed))
    with pytest.raises(JobError, match=r"max_tokens is 8\.5"):
        sampling_params(checked_fields({"max_tokens": 8.5}, COMPLETIONS), 0)
    with pytest.raises(JobError, match="max_tokens"):
        sampling_params(checked_fields({"max_tokens": "8"}, COMPLETIONS), 0)


def test_null_is_absent_for_every_field_that_is_honoured():
    honoured = (
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "ignore_eos",
        "stop_token_ids",
        "add_special_tokens",
        "messages",
        "documents",
        "chat_template_kwargs",
    )
    fields: dict[str, None] = {}
    fields |= dict.fromkeys(honoured)
    assert checked_fields(fields, CHAT) == {}
    assert sampling_params({}, 7).seed == 7
