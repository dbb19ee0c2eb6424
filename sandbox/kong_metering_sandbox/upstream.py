"""An upstream that answers what it was asked: `python -m kong_metering_sandbox.upstream --port N`.

Paths, wherever they stand in the target: `status/NNN` answers with that status, `slow/SECONDS` after a while, `bytes/N`
with so many bytes, `v1/chat/completions` like a model of OpenAI's; everything else with a JSON echo of the request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re

from aiohttp import web

_STATUS = re.compile(r"status/(\d{3})$")
_SLOW = re.compile(r"slow/(\d+(?:\.\d+)?)$")
_BYTES = re.compile(r"bytes/(\d+)$")
_MAX_BODY_BYTES = 64 * 1024 * 1024
_PROMPT_TOKENS, _COMPLETION_TOKENS = 11, 7


def make_app() -> web.Application:
    """Make the upstream's application."""
    app = web.Application(client_max_size=_MAX_BODY_BYTES)
    app.router.add_route("*", "/{path:.*}", _answer)
    return app


async def _answer(request: web.Request) -> web.StreamResponse:
    path = request.path
    if path.endswith("/v1/chat/completions"):
        return await _chat(request)
    if match := _SLOW.search(path):
        await asyncio.sleep(float(match[1]))
    if match := _BYTES.search(path):
        await request.read()  # else a client that first sends all of it, and then reads, would wait for ever
        return web.Response(body=b"x" * int(match[1]))
    match = _STATUS.search(path)
    return await _echo(request, int(match[1]) if match else 200)


async def _echo(request: web.Request, status: int) -> web.Response:
    body = await request.read()
    headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in request.raw_headers]
    echo = {
        "method": request.method,
        "path": request.raw_path.partition("?")[0],
        "query": request.rel_url.raw_query_string,
        "headers": headers,
        "body_bytes": len(body),
    }
    return web.json_response(echo, status=status)


async def _chat(request: web.Request) -> web.StreamResponse:
    asked = json.loads(await request.read() or b"{}")
    usage = {
        "prompt_tokens": _PROMPT_TOKENS,
        "completion_tokens": _COMPLETION_TOKENS,
        "total_tokens": _PROMPT_TOKENS + _COMPLETION_TOKENS,
    }
    base = {"id": "chatcmpl-1", "created": 1, "model": asked.get("model", "gpt-4o-mini")}
    if not asked.get("stream"):
        message = {"role": "assistant", "content": "Hello there."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response({**base, "object": "chat.completion", "choices": [choice], "usage": usage})
    return await _chat_in_pieces(request, {**base, "object": "chat.completion.chunk"}, usage)


async def _chat_in_pieces(request: web.Request, base: dict[str, object], usage: dict[str, int]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    pieces: list[dict[str, object]] = [
        {"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]} for word in ("Hello ", "there.")
    ]
    pieces.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    pieces.append({"choices": [], "usage": usage})
    for piece in pieces:
        await response.write(b"data: " + json.dumps({**base, **piece}).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    web.run_app(make_app(), host=options.host, port=options.port, print=None, access_log=None)


if __name__ == "__main__":
    main()
