"""JSON schemas of what the server answers, for the OpenAPI document. Those made by exactly() name every field that an
answer may hold."""

from __future__ import annotations

from typing import Any

from hetero_glm5.server.fields import NULL, OBJECT, TEXT, form, listed

WHOLE, NUMBER, YES = {"type": "integer"}, {"type": "number"}, {"type": "boolean"}


def exactly(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {**form(required, optional), "additionalProperties": False}


def maybe(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, NULL]}


def always(**values: Any) -> dict[str, Any]:
    """Fields that have one value."""
    return {name: {"const": value} for name, value in values.items()}


ERROR = exactly({"error": exactly({"message": TEXT, "type": TEXT, "param": maybe(TEXT), "code": maybe(TEXT)})})
ANTHROPIC_ERROR = exactly({**always(type="error"), "error": exactly({"type": TEXT, "message": TEXT})})

_USAGE = exactly(
    {
        **dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), WHOLE),
        "prompt_tokens_details": exactly({"cached_tokens": WHOLE}),
    },
    {"completion_tokens_details": exactly({"reasoning_tokens": WHOLE})},
)
_RATES = [f"{phase}_{name}" for phase in ("prompt", "predicted") for name in ("ms", "per_token_ms", "per_second")]
_TIMINGS = exactly(dict.fromkeys(("cache_n", "prompt_n", "predicted_n"), WHOLE) | dict.fromkeys(_RATES, NUMBER))
_TOKEN = {"token": TEXT, "logprob": NUMBER, "bytes": listed(WHOLE)}
_REASON = {"enum": ["stop", "length", "abort"]}


def _completion(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    about = {"id": TEXT, **always(object=kind), "created": WHOLE, "model": TEXT}
    return exactly(
        {**about, "choices": listed(exactly({"index": WHOLE, **choice}), 1), "usage": _USAGE, "timings": _TIMINGS}
    )


_CALL = exactly({"id": TEXT, **always(type="function"), "function": exactly({"name": TEXT, "arguments": TEXT})})
CHAT = _completion(
    "chat.completion",
    {
        "message": exactly(
            {**always(role="assistant"), "content": maybe(TEXT)},
            {"reasoning_content": TEXT, "tool_calls": listed(_CALL, 1)},
        ),
        "logprobs": maybe(
            exactly({"content": listed(exactly({**_TOKEN, "top_logprobs": listed(exactly(_TOKEN))})), "refusal": NULL})
        ),
        "finish_reason": {"enum": [*_REASON["enum"], "tool_calls"]},
    },
)
COMPLETION = _completion(
    "text_completion",
    {
        "text": TEXT,
        "logprobs": maybe(
            exactly(
                {
                    "tokens": listed(TEXT),
                    "token_logprobs": listed(maybe(NUMBER)),
                    "top_logprobs": listed(maybe({**OBJECT, "additionalProperties": NUMBER})),
                    "text_offset": listed(WHOLE),
                }
            )
        ),
        "finish_reason": _REASON,
    },
)
_BLOCKS = [
    exactly({**always(type="thinking"), "thinking": TEXT, "signature": TEXT}),
    exactly({**always(type="text"), "text": TEXT}),
    exactly({**always(type="tool_use"), "id": TEXT, "name": TEXT, "input": OBJECT}),
]
_MESSAGE_TOKENS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
MESSAGE = exactly(
    {
        "id": TEXT,
        **always(type="message", role="assistant"),
        "model": TEXT,
        "content": listed({"anyOf": _BLOCKS}),
        "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
        "stop_sequence": maybe(TEXT),
        "usage": exactly(
            dict.fromkeys(_MESSAGE_TOKENS, WHOLE) | {"output_tokens_details": exactly({"thinking_tokens": WHOLE})}
        ),
    }
)
COUNT = exactly({"input_tokens": WHOLE})


def _item(kind: str, more: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    about = {"id": TEXT, "status": {"enum": ["completed", "incomplete"]}, **always(type=kind)}
    return exactly({**about, **more}, optional)


_OUTPUT_TEXT = exactly({**always(type="output_text", annotations=[], logprobs=[]), "text": TEXT})
_ITEMS = [
    _item("message", {**always(role="assistant"), "content": listed(_OUTPUT_TEXT)}),
    _item("function_call", {"call_id": TEXT, "name": TEXT, "arguments": TEXT}),
    _item(
        "reasoning",
        {"summary": listed({}), "content": listed(exactly({**always(type="reasoning_text"), "text": TEXT}))},
        {"encrypted_content": TEXT},
    ),
]
RESPONSE = exactly(
    {
        "id": TEXT,
        **always(object="response", error=None, truncation="disabled"),
        "created_at": WHOLE,
        "status": {"enum": ["completed", "incomplete"]},
        "incomplete_details": maybe(exactly(always(reason="max_output_tokens"))),
        "instructions": maybe(TEXT),
        "max_output_tokens": maybe(WHOLE),
        "metadata": OBJECT,
        "model": TEXT,
        "output": listed({"anyOf": _ITEMS}),
        "parallel_tool_calls": YES,
        "previous_response_id": maybe(TEXT),
        "reasoning": exactly({"effort": maybe(TEXT), "summary": NULL}),
        "store": YES,
        "temperature": NUMBER,
        "text": OBJECT,
        "tool_choice": {"type": ["string", "object"]},
        "tools": listed(OBJECT),
        "top_p": NUMBER,
        "usage": exactly(
            {
                **dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), WHOLE),
                "input_tokens_details": exactly(dict.fromkeys(("cached_tokens", "cache_write_tokens"), WHOLE)),
                "output_tokens_details": exactly({"reasoning_tokens": WHOLE}),
            }
        ),
    }
)

_SCORES = listed({**listed({"type": ["number", "string", "null"]}, 3), "maxItems": 3})  # [value, token id, text]
_GENERATED = exactly(
    {
        "text": TEXT,
        "output_ids": listed(WHOLE),
        "meta_info": exactly(
            {
                "id": TEXT,
                "finish_reason": exactly(
                    {"type": TEXT}, {"matched": {"type": ["string", "integer", "null"]}, "length": WHOLE}
                ),
                **dict.fromkeys(("prompt_tokens", "completion_tokens", "cached_tokens"), WHOLE),
                "e2e_latency": NUMBER,
            },
            {
                **dict.fromkeys(("input_token_logprobs", "output_token_logprobs"), _SCORES),
                **dict.fromkeys(("input_top_logprobs", "output_top_logprobs"), listed(maybe(_SCORES))),
            },
        ),
    }
)
GENERATED = {"anyOf": [_GENERATED, listed(_GENERATED, 1)]}

CARD = exactly(
    {**always(object="model", owned_by="hetero_glm5"), "id": TEXT, "created": WHOLE, "max_model_len": maybe(WHOLE)}
)
CARDS = exactly({**always(object="list"), "data": listed(CARD)})
TOKENIZED = exactly(
    {
        "tokens": {"anyOf": [listed(WHOLE), listed(listed(WHOLE))]},
        "count": {"anyOf": [WHOLE, listed(WHOLE)]},
        "max_model_len": WHOLE,
    }
)
DETOKENIZED = exactly(dict.fromkeys(("prompt", "text"), {"anyOf": [TEXT, listed(TEXT)]}))
FLUSHED = exactly({**always(success=True), "message": TEXT})
ABORTED = exactly({"aborted": WHOLE})
PARSED = exactly({"normal_text": TEXT, "calls": listed(exactly({"name": TEXT, "parameters": TEXT}))})
SEPARATED = exactly({"reasoning_text": TEXT, "text": TEXT})
RECORDING = exactly({"recording": YES})
DUMPED = OBJECT
MODEL_INFO = exactly(
    {
        **dict.fromkeys(("model_path", "model_type", "tokenizer_path"), TEXT),
        "context_length": WHOLE,
        **always(is_generation=True, preferred_sampling_params=None),
    }
)
SERVER_INFO = form({"version": TEXT, "served_model_name": TEXT, "internal_states": listed(OBJECT)})
HEALTH = exactly(
    {"status": {"enum": ["ok", "loading", "failed", "busy"]}},
    {
        **dict.fromkeys(("message", "stage"), TEXT),
        **dict.fromkeys(("bytes_done", "bytes_total"), WHOLE),
        "gb_per_s": NUMBER,
        "eta_seconds": maybe(NUMBER),
    },
)
ALIVE = {"anyOf": [HEALTH, ERROR]}
