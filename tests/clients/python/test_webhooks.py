"""Webhooks of a running server, verified by the official OpenAI SDK for Python."""

import queue
import threading
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai
import pytest

from conftest import URL, call


@pytest.fixture
def receiver():
    posts = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            posts.put((body, dict(self.headers)))
            self.send_response(204)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", posts
    server.shutdown()


def test_a_delivery_is_what_the_sdk_takes_for_genuine(client, agent, receiver):
    url, posts = receiver
    _, hook = call("POST", f"{URL}/webhooks", {"url": url, "events": ["task:created"]})
    try:
        task = {"title": f"t {uuid.uuid4()}", "description": "d", "assignTo": agent, "draft": True}
        _, task = call("POST", f"{URL}/tasks", task)
        body, headers = posts.get(timeout=20)
        event = client.webhooks.unwrap(body, headers, secret=hook["secret"])
        assert (event.type, event.data.taskId) == ("task:created", task["id"])
        assert event.id.startswith("evt_") and headers["webhook-id"].startswith("whd_")
        client.webhooks.verify_signature(body, headers, secret=hook["secret"])
        for forged in (body.replace("task:created", "task:removed"), body + " "):
            with pytest.raises(openai.InvalidWebhookSignatureError):
                client.webhooks.unwrap(forged, headers, secret=hook["secret"])
        # Both secrets are good during the overlap.
        _, rotated = call("POST", f"{URL}/webhooks/{hook['id']}/rotate-secret", {})
        call("POST", f"{URL}/webhooks/{hook['id']}/deliveries/{headers['webhook-id']}/redeliver", {})
        again, headers = posts.get(timeout=20)
        assert again == body
        for secret in (hook["secret"], rotated["secret"]):
            assert client.webhooks.unwrap(again, headers, secret=secret).id == event.id
        call("DELETE", f"{URL}/tasks/{task['id']}")
    finally:
        call("DELETE", f"{URL}/webhooks/{hook['id']}")
