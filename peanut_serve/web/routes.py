"""What each route of vLLM's server needs. A route that is not listed here is refused.

So a route that a later vLLM adds can neither answer with the weights of another variant, nor answer without the key.
`tests/vllm_plugin/test_routes.py` compares the list with the routes of vLLM's own app.
"""

import re
from enum import Enum


class Access(str, Enum):
    """How a request for a route is handled."""

    ANSWER = "answer"  # waits for the weights of the variant that `model` names
    NAMES = "names"  # knows the names of variants, but needs no weights
    KEYED = "keyed"  # needs the API key, if there is one
    OPEN = "open"  # needs no key: monitoring, and the description of the API
    REFUSED = "refused"


_ANSWERS = """
/v1/completions /v1/chat/completions /v1/chat/completions/batch /v1/responses /v1/messages /v1/systemone
/inference/v1/generate /generative_scoring /invocations /cohere/v2/chat
/v1/embeddings /v2/embed /pooling /classify /score /v1/score /rerank /v1/rerank /v2/rerank
"""
_NAMES = """
/tokenize /detokenize /v1/messages/count_tokens /v1/models
/v1/completions/render /v1/chat/completions/render /v1/responses/render /v1/messages/render /cohere/v2/chat/render
/v1/completions/derender /v1/chat/completions/derender
"""
_KEYED = """
/v1/responses/{id} /v1/responses/{id}/cancel /inference/v1/abort_requests /abort_requests /tokenizer_info
/start_profile /stop_profile /is_scaling_elastic_ep /is_paused /is_sleeping /get_world_size /server_info /weight_info
/weight_checker /kv_event_sources /collective_rpc /reset_prefix_cache /reset_mm_cache /reset_encoder_cache
/fault_tolerance/status
"""
_OPEN = """
/health /ready /ping /metrics /metrics/ /version /load /docs /docs/oauth2-redirect /redoc /openapi.json
"""
_REFUSED = {
    "it loads a folder that the client names": """
        /v1/load_lora_adapter /v1/unload_lora_adapter /adapters /adapters/{id}""",
    "it changes the weights or the engine, which peanut-serve controls": """
        /init_weight_transfer_engine /shutdown_weight_transfer_engine /start_weight_update /finish_weight_update
        /start_draft_weight_update /update_weights /update_weight_version /release_kv_cache_memory /sleep /wake_up
        /pause /resume /scale_elastic_ep /fault_tolerance/apply""",
    "its body is not JSON, and peanut-serve reads the variant's name from JSON": """
        /v1/audio/transcriptions /v1/audio/translations""",
    "peanut-serve does not serve websockets": "/v1/realtime",
}

_ACCESS = {
    **dict.fromkeys(_ANSWERS.split(), Access.ANSWER),
    **dict.fromkeys(_NAMES.split(), Access.NAMES),
    **dict.fromkeys(_KEYED.split(), Access.KEYED),
    **dict.fromkeys(_OPEN.split(), Access.OPEN),
}
_REASONS = {path: reason for reason, paths in _REFUSED.items() for path in paths.split()}
_PATTERNS = {path: re.compile(re.sub(r"\{\w+\}", "[^/]+", path)) for path in [*_ACCESS, *_REASONS] if "{" in path}


def access_to(path: str) -> Access:
    """How a request for a path is handled."""
    return _ACCESS.get(_known(path), Access.REFUSED)


def refusal_of(path: str) -> str | None:
    """Why a known route is refused; None for an unknown one."""
    return _REASONS.get(_known(path))


def is_known(path: str) -> bool:
    """Whether a route is in the list; `path` may be a template of vLLM's, like `/v1/responses/{response_id}`."""
    known = _known(path)
    return known in _ACCESS or known in _REASONS


def _known(path: str) -> str:
    return next((listed for listed, pattern in _PATTERNS.items() if pattern.fullmatch(path)), path)
