"""A provider that speaks OpenAI's chat completions and answers from what it is asked.

Prints its base URL and serves until it is ended. Standard library only.
"""

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USAGE = {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}


def text_of(message):
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "") for part in content)


def answer_to(request):
    """Text, or the tool call that comes instead of it."""
    last = request["messages"][-1]
    if last["role"] == "tool":
        return f"It is {last['content']} degrees.", None
    asked = text_of(last)
    if request.get("tools") and "weather" in asked:
        return None, {"id": "call_up_1", "name": request["tools"][0]["function"]["name"], "pieces": ['{"ci', 'ty": "Tu', 'rin"}']}
    if request.get("response_format"):
        wrong = "WRONG" in asked or any("ALWAYS WRONG" in text_of(message) for message in request["messages"])
        return ('{"town": 1}' if wrong else '{"city": "Turin", "degrees": 21}'), None
    return f"Hello from upstream: {asked}", None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def refuse(self, status, message, code, headers=()):
        body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def piece(self, data):
        frame = f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(frame), frame))

    def chunk(self, delta, finish=None):
        self.piece({"id": "chatcmpl-up", "object": "chat.completion.chunk", "created": int(time.time()), "model": "up",
                    "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked = text_of(request["messages"][-1])
        if "STATUS 401" in asked:
            return self.refuse(401, "Incorrect API key provided: sk-hidden-0123456789", "invalid_api_key")
        if "STATUS 400" in asked:
            return self.refuse(400, "That model cannot do that", "unsupported_value")
        if "STATUS 429" in asked:
            return self.refuse(429, "Rate limit reached", "rate_limit_exceeded", [("retry-after", "120")])
        if "STATUS 500" in asked:
            return self.refuse(500, "The server had an error", "server_error")
        if "TOO LONG" in asked:
            return self.refuse(400, "This model's maximum context length is 8192 tokens", "context_length_exceeded")
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        text, call = answer_to(request)
        self.chunk({"role": "assistant", "content": ""})
        if call:
            self.chunk({"tool_calls": [{"index": 0, "id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": ""}}]})
            for piece in call["pieces"]:
                self.chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
            self.chunk({}, "tool_calls")
        else:
            for number, word in enumerate(text.split(" ")):
                self.chunk({"content": word if number == 0 else " " + word})
                if "CUT" in asked and number == 2:
                    self.close_connection = True
                    return
            self.chunk({}, "stop")
        self.piece({"id": "chatcmpl-up", "object": "chat.completion.chunk", "created": 1, "model": "up", "choices": [], "usage": USAGE})
        self.piece("[DONE]")
        self.wfile.write(b"0\r\n\r\n")


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()
