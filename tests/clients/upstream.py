"""A provider that speaks OpenAI's chat completions and answers from nothing but what it is asked.

Prints its address and serves until it is ended: the API is at /v1, what it was asked at /requests. Standard library only.

What the last user message says decides: `CALL weather` (`twice`) calls a tool, `CALL memory` the server's, `STATUS 401|429|500` and `CONTEXT` refuse,
`CUT` drops the connection midway, `FAIL` sends an error midway, `SLOW` takes two seconds, `RECALL` repeats what users said,
`WRONG` breaks `response_format` (`ALWAYS WRONG` anywhere: every time). Anything else is greeted.
"""

import hashlib
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "test-model"
KEY = "k"
REFUSALS = {
    "STATUS 401": (401, "Incorrect API key provided: sk-hidden-0123456789. You can find your API key in your account.", "invalid_request_error", None, "invalid_api_key"),
    "STATUS 429": (429, "Rate limit reached for test-model on requests per min (RPM): Limit 3, Used 3, Requested 1.", "requests", None, "rate_limit_exceeded"),
    "STATUS 500": (500, "The server had an error while processing your request. Sorry about that!", "server_error", None, None),
    "CONTEXT": (400, "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens. Please reduce the length of the messages.",
                "invalid_request_error", "messages", "context_length_exceeded"),
}


def text_of(message):
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def users(request):
    return [text_of(message) for message in request["messages"] if message["role"] == "user"]


def says(text, words):
    return re.search(rf"\b{words}\b", text) is not None


def fitting(schema, root, name="text"):
    """A value that a JSON Schema accepts, as far as clients' schemas go."""
    if "$ref" in schema:
        found = root
        for step in schema["$ref"].removeprefix("#").strip("/").split("/"):
            found = found[step] if step else found
        return fitting(found, root, name)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return fitting(schema[key][0], root, name)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return {key: fitting(value, root, key) for key, value in schema.get("properties", {}).items()}
    if kind == "array":
        return [fitting(schema.get("items", {}), root, name)]
    return {"string": "Turin" if name == "city" else name, "integer": 21, "number": 21, "boolean": True}.get(kind)


def formatted(request, asked):
    wish = request["response_format"]
    if says(asked, "WRONG") or any(says(text, "ALWAYS WRONG") for text in users(request)):
        return '["neither an object", "nor what was asked for"]'
    if wish["type"] == "json_object":
        return json.dumps({"city": "Turin", "degrees": 21})
    schema = wish["json_schema"]["schema"]
    return json.dumps(fitting(schema, schema))


def answer_to(request, asked):
    """The text, or the tool calls that come instead of it."""
    tools = [tool["function"]["name"] for tool in request.get("tools") or []]
    if request["messages"][-1]["role"] == "tool":
        return "It is 21 degrees in Turin.", []
    if says(asked, "CALL weather") and "get_weather" in tools and request.get("tool_choice") != "none":
        cities = ["Turin", "Rome"] if says(asked, "twice") and request.get("parallel_tool_calls") is not False else ["Turin"]
        seed = hashlib.sha256(json.dumps(request["messages"]).encode()).hexdigest()
        return None, [{"id": f"call_{index}{seed[:23]}", "type": "function",
                       "function": {"name": "get_weather", "arguments": json.dumps({"city": city})}} for index, city in enumerate(cities)]
    if says(asked, "CALL memory") and "memory_save" in tools:
        return None, [{"id": "call_memory", "type": "function",
                       "function": {"name": "memory_save", "arguments": json.dumps({"content": "Likes tea"})}}]
    if (request.get("response_format") or {}).get("type") in ("json_object", "json_schema"):
        return formatted(request, asked), []
    if says(asked, "RECALL"):
        return "You said: " + " | ".join(users(request)), []
    if says(asked, "SLOW"):
        return " ".join(f"word {number}" for number in range(20)), []
    return f"Hello from upstream: {asked}", []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    asked = []
    lock = threading.Lock()

    def log_message(self, *_):
        pass

    def reply(self, status, value, headers=()):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        for name, text in headers:
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, message, kind="invalid_request_error", param=None, code=None):
        headers = [("retry-after", "60")] if status == 429 else []
        self.reply(status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers)

    def do_GET(self):
        model = {"id": MODEL, "object": "model", "created": 1700000000, "owned_by": "upstream"}
        if self.path == "/requests":
            with self.lock:
                self.reply(200, self.asked)
        elif self.path == "/v1/models":
            self.reply(200, {"object": "list", "data": [model]})
        elif self.path == f"/v1/models/{MODEL}":
            self.reply(200, model)
        elif self.path.startswith("/v1/models/"):
            name = self.path.removeprefix("/v1/models/")
            self.refuse(404, f"The model '{name}' does not exist", param="model", code="model_not_found")
        else:
            self.refuse(404, f"Invalid URL (GET {self.path})")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path != "/v1/chat/completions":
            return self.refuse(404, f"Invalid URL (POST {self.path})")
        if self.headers.get("authorization") != f"Bearer {KEY}":
            return self.refuse(401, "Incorrect API key provided.", code="invalid_api_key")
        request = json.loads(body)
        if not request.get("messages"):
            return self.refuse(400, "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead.",
                               param="messages", code="empty_array")
        if request.get("model") != MODEL:
            return self.refuse(404, f"The model `{request.get('model')}` does not exist or you do not have access to it.", code="model_not_found")
        record = {"body": request, "outcome": "running"}
        with self.lock:
            self.asked.append(record)
        try:
            record["outcome"] = self.complete(request)
        except (BrokenPipeError, ConnectionResetError):
            record["outcome"] = "left"
            self.close_connection = True

    def complete(self, request):
        asked = (users(request) or [""])[-1]
        for sign, refusal in REFUSALS.items():
            if says(asked, sign):
                self.refuse(*refusal)
                return "refused"
        text, calls = answer_to(request, asked)
        words = re.findall(r"\S+\s*|\s+", text or "")
        most = request.get("max_completion_tokens") or request.get("max_tokens")
        finish = "tool_calls" if calls else "stop"
        if most and len(words) > most:
            words, finish = words[:most], "length"
        prompt = sum(len(text_of(message).split()) for message in request["messages"])
        said = len(words) + 5 * len(calls)
        usage = {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said,
                 "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
                 "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0,
                                               "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}}
        name = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:24]
        head = {"id": f"chatcmpl-{name}", "created": int(time.time()), "model": MODEL, "service_tier": "default", "system_fingerprint": "fp_upstream"}
        if request.get("stream"):
            return self.stream(request, asked, head, words, calls, finish, usage)
        return self.whole(asked, head, words, calls, finish, usage)

    def whole(self, asked, head, words, calls, finish, usage):
        message = {"role": "assistant", "content": None if calls else "".join(words), "refusal": None, "annotations": []}
        if calls:
            message["tool_calls"] = calls
        if says(asked, "FAIL"):
            self.refuse(*REFUSALS["STATUS 500"])
            return "refused"
        if says(asked, "CUT"):
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", "4096")
            self.end_headers()
            self.wfile.write(b'{"id": "chatcmpl-')
            self.close_connection = True
            return "cut"
        if says(asked, "SLOW"):
            time.sleep(2)
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        self.reply(200, head | {"object": "chat.completion", "choices": [choice], "usage": usage})
        return "finished"

    def stream(self, request, asked, head, words, calls, finish, usage):
        include_usage = (request.get("stream_options") or {}).get("include_usage", False)

        def frame(data):
            text = f"data: {data if isinstance(data, str) else json.dumps(data, separators=(',', ':'))}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
            self.wfile.flush()

        def chunk(choices, usage=None):
            frame(head | {"object": "chat.completion.chunk", "choices": choices} | ({"usage": usage} if include_usage else {}))

        def delta(delta, finish=None):
            chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}])

        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        delta({"role": "assistant", "content": None if calls else "", "refusal": None})
        for index, call in enumerate(calls):
            function = call["function"]
            delta({"tool_calls": [{"index": index, "id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": ""}}]})
            for piece in re.findall(r".{1,5}", function["arguments"]):
                delta({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
        for number, word in enumerate(words):
            if number == 3 and says(asked, "CUT"):
                self.close_connection = True
                return "cut"
            if number == 3 and says(asked, "FAIL"):
                status, message, kind, param, code = REFUSALS["STATUS 500"]
                frame({"error": {"message": message, "type": kind, "param": param, "code": code}})
                break
            if says(asked, "SLOW"):
                time.sleep(0.05)
            delta({"content": word})
        else:
            delta({}, finish)
            if include_usage:
                chunk([], usage)
        frame("[DONE]")
        self.wfile.write(b"0\r\n\r\n")
        return "finished"


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *about):
        # A caller that leaves is no error here.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*about)


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    server = Server(("127.0.0.1", port), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
