"""The statistics of AI plugins, as the log record has them, whatever version of Kong wrote them.

Their place and spelling changed from version to version; `docs/ai-usage.md` tells more, with a sample of each:

    Kong             account of a plugin                  counts
    3.6              `ai` itself, one for all plugins     prompt_tokens, completion_tokens
    3.7              `ai.<plugin>`                        prompt_token, completion_token
    3.8              `ai.<plugin>`                        prompt_tokens, completion_tokens
    3.9 and later    `ai.proxy` for ai-proxy,             prompt_tokens, completion_tokens
                     `ai.<plugin>` for transformers
    Enterprise       as above; ai-proxy-advanced as       also input_tokens, output_tokens
                     ai-proxy; others inside `ai.proxy`

No version is asked for here: an object with `meta` or `usage` is one AI plugin's account of the request, wherever under
`ai` it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from kong_metering.record import integer, legible, mapping, readable, section, text

if TYPE_CHECKING:
    from kong_metering.record import Record

# What Kong 3.9 calls `proxy`; and 3.6 has one account for all plugins, of which ai-proxy is the one in common use.
_PROXY = "ai-proxy"
# Parts of an account, and what is logged under `ai` that is none.
_NOT_ACCOUNTS = frozenset(
    {"meta", "usage", "cache", "payload", "tried_targets", "audit", "sanitizer", "compressor", "mcp", "a2a"}
)
_UNKNOWN = frozenset({"UNSPECIFIED", "NOT_SPECIFIED"})
_PROMPT = ("prompt_tokens", "prompt_token", "input_tokens")
_COMPLETION = ("completion_tokens", "completion_token", "output_tokens")
# A request passes a handful of AI plugins; a record that claims more is not from Kong.
_MAX_ACCOUNTS = 16
# `ai`, a plugin's account in it, and ai-llm-as-judge, which is documented inside the proxy's account.
_MAX_DEPTH = 2


@dataclass(frozen=True)
class AIUsage:
    """What one AI plugin used for a request; a count that is missing or zero is None, and so is an unknown name."""

    plugin_name: str
    plugin_id: str | None
    provider: str | None
    request_model: str | None
    response_model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cache_status: str | None


def ai_usages(record: Record) -> list[AIUsage]:
    """List what each AI plugin used that counted tokens for a request, in the record's order.

    A plugin handles a request once: an account that stands in the record under a second name counts once.
    """
    usages: dict[str, AIUsage] = {}
    for name, account in islice(_accounts("proxy", mapping(record.ai)), _MAX_ACCOUNTS):
        usage = _usage(_PROXY if name == "proxy" else readable(name), account)
        if usage.prompt_tokens or usage.completion_tokens:
            usages.setdefault(usage.plugin_name, usage)
    return list(usages.values())


def _accounts(name: str, value: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if _is_account(value):
        yield name, value
    if depth < _MAX_DEPTH:
        for inner_name, inner in value.items():
            if inner_name and inner_name not in _NOT_ACCOUNTS and isinstance(inner, dict):
                yield from _accounts(inner_name, inner, depth + 1)


def _is_account(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get("meta"), dict) or isinstance(value.get("usage"), dict)


def _usage(name: str, account: Mapping[str, Any]) -> AIUsage:
    meta, usage = section(account, "meta"), section(account, "usage")
    request_model, response_model = _known(meta.get("request_model")), _known(meta.get("response_model"))
    return AIUsage(
        plugin_name=name,
        plugin_id=text(meta.get("plugin_id")),
        provider=_known(meta.get("provider_name")),
        request_model=request_model or response_model,
        response_model=response_model or request_model,
        prompt_tokens=_tokens(usage, _PROMPT),
        completion_tokens=_tokens(usage, _COMPLETION),
        cache_status=text(section(account, "cache").get("cache_status")),
    )


def _known(value: object) -> str | None:
    """Take a name that a client or a model may have chosen, unless it stands for none."""
    known = text(value)
    return None if known is None or known in _UNKNOWN else legible(known)


def _tokens(usage: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    counts = (integer(usage.get(name)) for name in names)
    return next((count for count in counts if count), None)
