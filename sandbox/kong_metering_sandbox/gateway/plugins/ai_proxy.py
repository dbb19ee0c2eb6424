"""ai-proxy for OpenAI's chat format: sends the request to the configured model and notes the tokens it used.

Without `model.options.upstream_url` the stand-in answers itself. `standin_ai_shape` chooses the Kong version
whose shape the token counts have in the record.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kong_metering_sandbox.gateway.context import LocalResponse, PluginExit, Reply, Target
from kong_metering_sandbox.gateway.values import Value, as_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kong_metering_sandbox.gateway.context import Exchange
    from kong_metering_sandbox.gateway.values import Table

    from .base import Identities

_BAD_REQUEST = 400
_PLUGIN = "ai-proxy"
_DEFAULT_PATH = "/v1/chat/completions"
_COST_UNIT = 1_000_000  # costs are configured per million tokens
_LOCAL_USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
_TOKEN_NAMES_3_7 = {
    "prompt_tokens": "prompt_token",
    "completion_tokens": "completion_token",
    "total_tokens": "total_tokens",
}


class AiProxy:
    """Turns a chat request to any route into one to the model."""

    priority = 770

    async def access(self, exchange: Exchange, config: Table, identities: Identities) -> None:  # noqa: ARG002
        """Send the request to the model instead of to the service, or refuse what is no chat request."""
        await exchange.ensure_body()
        chat = _chat_request(exchange.body)
        model = config["model"]
        options = model.get("options") or {}
        call = _Call(config, model.get("name") or chat.get("model") or "UNSPECIFIED")
        call.stream = bool(chat.get("stream")) and config["response_streaming"] != "deny"
        chat["model"] = call.request_model
        if call.stream:
            chat["stream_options"] = {"include_usage": True}
        exchange.body = json.dumps(chat).encode()
        exchange.headers.set(b"Content-Type", b"application/json")
        exchange.headers.set(b"Content-Length", b"%d" % len(exchange.body))
        exchange.headers.set(b"Accept-Encoding", b"gzip, identity")
        _authorize(exchange, config.get("auth") or {})
        _redirect(exchange, options)
        call.is_local = "upstream_url" not in options
        if config["model_name_header"]:
            name = f"{model['provider']}/{call.request_model}"
            exchange.extra_headers.append((b"X-Kong-LLM-Model", name.encode()))
        exchange.observer = call


def _chat_request(body: bytes) -> Table:
    try:
        chat = json.loads(body)
    except ValueError:
        chat = None
    if not isinstance(chat, dict):
        raise PluginExit(
            Reply.json(_BAD_REQUEST, {"error": {"message": "content-type header does not match request body"}})
        )
    if not isinstance(chat.get("messages"), list):
        message = "request format not recognised"
        raise PluginExit(Reply.json(_BAD_REQUEST, {"error": {"message": message}}))
    return dict(chat)


def _authorize(exchange: Exchange, auth: Table) -> None:
    if auth.get("header_name"):
        exchange.headers.set(as_bytes(auth["header_name"]), as_bytes(auth["header_value"]))


def _redirect(exchange: Exchange, options: Table) -> None:
    """Point the exchange to the model's address."""
    url = urlsplit(options.get("upstream_url", f"https://api.openai.com{_DEFAULT_PATH}"))
    port = url.port or (443 if url.scheme == "https" else 80)
    path = options.get("upstream_path") or url.path or _DEFAULT_PATH
    old = exchange.target
    exchange.target = Target(
        scheme=url.scheme,
        host=url.hostname or "",
        port=port,
        path=path.encode(),
        host_header=url.netloc.encode(),
        retries=old.retries if old else 5,
        connect_timeout=old.connect_timeout if old else 60.0,
        read_timeout=old.read_timeout if old else 60.0,
    )
    exchange.upstream_uri = path.encode()
    exchange.method = b"POST"


@dataclass
class _Call:
    """One call of a model: sees the response go by and writes what it used into the record."""

    config: Table
    request_model: str
    stream: bool = False
    is_local: bool = False
    started: float = field(default_factory=time.monotonic)
    received: bytearray = field(default_factory=bytearray)
    is_success: bool = True

    def respond(self) -> LocalResponse | None:
        """Return the stand-in's own answer, where no model is configured."""
        if not self.is_local:
            return None
        kind = b"text/event-stream" if self.stream else b"application/json"
        pieces = _local_answer(self.request_model, stream=self.stream)
        return LocalResponse(((b"Content-Type", kind),), pieces)

    def see_head(self, exchange: Exchange) -> None:
        """Note whether the model gave an answer; one that is not streamed is buffered, as in Kong."""
        self.is_success = exchange.status < _BAD_REQUEST
        if not self.stream:
            exchange.buffered_status = exchange.status

    def see_piece(self, data: bytes) -> None:
        """Keep the response's body."""
        self.received += data

    def finish(self, exchange: Exchange) -> None:
        """Put the statistics into the record, where the plugin is configured to."""
        logging = self.config["logging"]
        answer = self._answer()
        if not self.is_success or answer is None:
            return
        key = {"3.9": "ai.proxy", "3.6": "ai"}.get(self.config["standin_ai_shape"], f"ai.{_PLUGIN}")
        if logging["log_payloads"]:
            exchange.serialize_values += [
                (f"{key}.payload.request", exchange.body),
                (f"{key}.payload.response", bytes(self.received)),
            ]
        if logging["log_statistics"]:
            exchange.serialize_values += self._statistics(key, answer)

    def _answer(self) -> Table | None:
        """Return the model's answer: the body, or the last piece of a stream that tells the usage."""
        answer: Table | None = None
        for document in _documents(bytes(self.received), stream=self.stream):
            if answer is None or document.get("usage"):
                answer = document
        return answer

    def _statistics(self, key: str, answer: Table) -> list[tuple[str, Value]]:
        shape = self.config["standin_ai_shape"]
        usage: Table = answer.get("usage") or {}
        meta = {
            "request_model": self.request_model,
            "response_model": answer.get("model") or self.request_model,
            "provider_name": self.config["model"]["provider"],
        }
        if shape == "3.6":
            tokens = {name: usage.get(name, 0) for name in _TOKEN_NAMES_3_7}
            entries: list[tuple[str, Value]] = [(f"{key}.usage.{name}", count) for name, count in tokens.items()]
            return [*entries, *((f"{key}.meta.{name}", value) for name, value in meta.items())]
        meta["plugin_id"] = self.config["__plugin_id"]
        if shape == "3.7":
            tokens = {new: usage.get(name, 0) for name, new in _TOKEN_NAMES_3_7.items()}
            return [(f"{key}.usage", tokens), (f"{key}.meta", meta)]
        latency = int((time.monotonic() - self.started) * 1000)
        parts: list[tuple[str, Value]] = [
            (f"{key}.meta", {**meta, "llm_latency": latency}),
            (f"{key}.usage", self._usage(usage, latency)),
        ]
        return [*parts, (f"{key}.cache", {})] if shape == "3.8" else parts

    def _usage(self, usage: Table, latency: int) -> Table:
        result: Table = {name: usage[name] for name in _TOKEN_NAMES_3_7 if name in usage}
        completion = usage.get("completion_tokens")
        if completion is not None:
            result["time_per_token"] = latency // completion if completion else 0
        options = self.config["model"].get("options") or {}
        if "input_cost" in options and "output_cost" in options and "prompt_tokens" in usage:
            cost = usage["prompt_tokens"] * options["input_cost"] + (completion or 0) * options["output_cost"]
            result["cost"] = cost / _COST_UNIT
        return result


def _documents(body: bytes, *, stream: bool) -> list[Table]:
    texts = [body]
    if stream:
        lines = (line.strip() for line in body.split(b"\n"))
        texts = [line.removeprefix(b"data:") for line in lines if line.startswith(b"data:")]
    documents = []
    for text in texts:
        try:
            document = json.loads(text)
        except ValueError:
            continue  # the end mark of a stream, or an answer that is no JSON: nothing to count
        if isinstance(document, dict):
            documents.append(document)
    return documents


async def _local_answer(model: str, *, stream: bool) -> AsyncIterator[bytes]:
    message = {"role": "assistant", "content": "This is the stand-in: no model was asked."}
    answer: Table = {"id": "chatcmpl-standin", "created": int(time.time()), "model": model}
    if not stream:
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        whole = {**answer, "object": "chat.completion", "choices": [choice], "usage": _LOCAL_USAGE}
        yield json.dumps(whole).encode()
        return
    answer["object"] = "chat.completion.chunk"
    pieces = [
        {**answer, "choices": [{"index": 0, "delta": message, "finish_reason": None}]},
        {**answer, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {**answer, "choices": [], "usage": _LOCAL_USAGE},
    ]
    for piece in pieces:
        yield b"data: " + json.dumps(piece).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"
