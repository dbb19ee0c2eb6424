"""The statistics of AI plugins, as the log record has them, whatever version of Kong wrote them.

Their place and spelling changed from version to version; `docs/ai-usage.md` has the table. No version is asked for
here: an object with `meta` or `usage` is one AI plugin's account of the request, wherever under `ai` it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kong_metering.record import integer, section, text

if TYPE_CHECKING:
    from kong_metering.record import Record

# Kong 3.9 calls ai-proxy's container so; 3.6 has one container for all, and no plugin but ai-proxy in common use.
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
    """List the accounts of all AI plugins that handled a request, in the record's order."""
    ai = section(record, "ai")
    if not ai:
        return []
    accounts = [(_PROXY, ai)] if _is_account(ai) else list(_accounts(ai))
    return [_usage(name, account) for name, account in accounts[:_MAX_ACCOUNTS]]


def _accounts(container: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, value in container.items():
        if name in _NOT_ACCOUNTS or not isinstance(value, dict):
            continue
        if _is_account(value):
            yield _PROXY if name == "proxy" else name, value
        if depth == 0:  # ai-llm-as-judge is documented inside the proxy's account
            yield from _accounts(value, depth + 1)


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
    return None if value in _UNKNOWN else text(value)


def _tokens(usage: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    counts = (integer(usage.get(name)) for name in names)
    return next((count for count in counts if count), None)
