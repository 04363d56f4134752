"""The fields of a request's body: which are honoured, which change nothing, which are refused.

The names are those of OpenAI's API and of what vLLM and SGLang add to it. A field that is null is
absent. What is not computed here passes only with a value that changes nothing, so that no answer
is another one than was asked for.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from executor.errors import JobError
from executor.sampling import SamplingParams

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
URLS: Final = (COMPLETIONS, CHAT)

_SAMPLING: Final = {
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
}
_HONOURED: Final = {
    COMPLETIONS: _SAMPLING | {"prompt", "add_special_tokens"},
    CHAT: _SAMPLING | {"messages", "add_special_tokens", "add_generation_prompt", "documents", "chat_template_kwargs"},
}
# The value of `logprobs` that asks for those of the chosen tokens and no others.
CHOSEN_ALONE: Final = {COMPLETIONS: 0, CHAT: True}
_INTEGERS: Final = {"top_k", "max_tokens", "max_completion_tokens", "seed", "stop_token_ids", "prompt"}

# For bookkeeping, caches and scheduling: no answer depends on them.
_IGNORED: Final = {
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "cache_salt",
    "request_id",
    "rid",
    "priority",
    "prediction",
    "stream_options",
    "parallel_tool_calls",
    "spaces_between_special_tokens",
    "truncation_side",
    "stream_interval",
    "media_io_kwargs",
}

# The values that change nothing, the first of which is told.
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    # how many answers, and how they are sent
    "n": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "length_penalty": (1,),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_hidden_states": (False,),
    "detokenize": (True,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "verbosity": ("medium",),
    # which tokens may come
    "top_a": (0,),
    "typical_p": (1,),
    "min_tokens": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "logits_processors": ([],),
    "custom_params": ({},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "json_schema": (),
    "regex": ("",),
    "ebnf": ("",),
    # what ends an answer, and what of it is said
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    # what the prompt is made of
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "continue_final_message": (False,),
    "audio": ({},),
    "mm_processor_kwargs": ({},),
    "vllm_xargs": ({},),
    "kv_transfer_params": ({},),
    "web_search_options": (),
    "reasoning_effort": (),
    "chat_template": (),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "thinking_token_budget": (),
}
# With temperature 0 the most probable token is taken, whatever these say of the others.
_OF_CHANCE: Final = {"typical_p", "top_a"}


def checked_fields(body: Mapping[str, Any], url: str) -> dict[str, Any]:
    """The fields that are honoured, without those that are null, integers as integers.

    Raises JobError naming the first field that asks for what is not done here.
    """
    given = {key: value for key, value in body.items() if value is not None}
    honoured = set(_HONOURED[url])
    greedy = _same(given.get("temperature"), 0)
    if _same(given.get("logprobs"), CHOSEN_ALONE[url]):
        given["logprobs"] = True
        honoured |= {"logprobs"}
    for key, value in given.items():
        if key in honoured or key in _IGNORED or (greedy and _leaves_the_first(key, value)):
            continue
        neutral = _NEUTRAL.get(key)
        if neutral is None:
            _refuse_unknown(key, value, url)
        elif not any(_same(value, one) for one in neutral) and not _changes_nothing(key, value):
            asked = (CHOSEN_ALONE[url],) if key == "logprobs" else ()
            allowed = " or ".join(map(json.dumps, (*asked, *neutral, None)))
            raise JobError(f"body: {key}", _brief(value), f"must be {allowed}; more is not supported", "remove it")
    return {key: _as_integers(value) if key in _INTEGERS else value for key, value in given.items() if key in honoured}


def needed(fields: Mapping[str, Any], key: str) -> Any:
    """The field that a request cannot be without; JobError if it is missing or null."""
    if key not in fields:
        raise JobError(f"body: {key}", "<missing>", "must be given", "add it")
    return fields[key]


def sampling_params(
    fields: Mapping[str, Any], default_seed: int, defaults: Mapping[str, float] | None = None
) -> SamplingParams:
    """The sampling parameters of checked fields; `defaults` count before OpenAI's."""
    values = {key: fields[key] for key in (_SAMPLING | {"logprobs"}) & fields.keys()}
    if "max_completion_tokens" in values:
        values["max_tokens"] = values.pop("max_completion_tokens")
    if "stop" in values:
        stop = values["stop"]
        values["stop"] = (stop,) if isinstance(stop, str) else _tuple(stop, "stop")
    if "stop_token_ids" in values:
        values["stop_token_ids"] = _tuple(values["stop_token_ids"], "stop_token_ids")
    return SamplingParams(**{"seed": default_seed, **(defaults or {}), **values})


def truth(fields: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """The truth value of a field."""
    value = fields.get(key, default)
    if not isinstance(value, bool):
        raise JobError(f"body: {key}", _brief(value), "must be true or false", "correct it")
    return value


def _refuse_unknown(key: str, value: Any, url: str) -> None:
    elsewhere = [other for other in URLS if key in _HONOURED[other]]
    if elsewhere:
        raise JobError(
            f"body: {key}", _brief(value), f"is a field of {elsewhere[0]}, not of {url}", "correct the url or the field"
        )
    raise JobError(f"body: {key}", _brief(value), "is no field known here", "remove it")


def _same(value: object, neutral: object) -> bool:
    """Equality of JSON: true is not 1, but 1.0 is."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _changes_nothing(key: str, value: Any) -> bool:
    """Whether a value is another spelling of one that changes nothing."""
    if key == "logit_bias" and isinstance(value, dict):
        return all(_same(bias, 0) for bias in value.values())
    return False


def _leaves_the_first(key: str, value: Any) -> bool:
    """Whether the most probable token is always among those that the field leaves."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return key in _OF_CHANCE and number and 0 <= value <= 1


def _as_integers(value: Any) -> Any:
    """Numbers such as 8.0, which JSON calls integers, as Python does; lists alike."""
    if isinstance(value, list):
        return [_as_integers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tuple(value: Any, field: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise JobError(f"body: {field}", _brief(value), "must be a list", "correct the request")
    return tuple(value)


def _brief(value: Any) -> Any:
    """The value, if it is short."""
    return f"<{type(value).__name__}>" if isinstance(value, dict | list) and value else value
