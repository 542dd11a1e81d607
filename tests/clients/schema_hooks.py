"""Chat requests that are answered: one made up at random holds so much that something of it is always refused."""

import json
import zlib

import schemathesis

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": [{"type": "text", "text": "Bye"}]}]


@schemathesis.hook
def map_body(context, body):
    if context.operation.path.endswith(("/run", "/execute")) and isinstance(body, dict):
        # What a stream holds is not what the document says of the whole.
        return body | {"stream": False}
    if context.operation.path != "/v1/chat/completions" or not isinstance(body, dict):
        return body
    # Two of three, the same ones in every run, keep about one in twelve of their members and get what an answer needs.
    coin = zlib.crc32(json.dumps(body, sort_keys=True, default=str).encode())
    if coin % 3 == 0:
        return body
    kept = {name: value for name, value in body.items() if zlib.crc32(name.encode(), coin) % 12 == 0}
    # Streams are left to the SDKs: Schemathesis holds each event against what the document says of the whole.
    return kept | {"agent": "probe", "messages": MESSAGES[: 1 + coin % 2 * 2], "stream": False}
