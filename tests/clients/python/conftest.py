"""A project's own provider, an agent that asks it, and the SDK's client."""

import json
import os
import urllib.request
import uuid

import pytest
from openai import OpenAI

URL = os.environ["POLPO_URL"]
KEY = os.environ["POLPO_API_KEY"]
UPSTREAM = os.environ["UPSTREAM_CONTROL_URL"]


def call(method, url, body=None, key=KEY):
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=20) as answer:
        return answer.status, json.load(answer)


def asked_of_upstream(text):
    """What the upstream was asked with this text, oldest first."""
    _, requests = call("GET", f"{UPSTREAM}/requests")
    return [request for request in requests if text in json.dumps(request["body"]["messages"])]


@pytest.fixture(scope="session")
def agent():
    provider = {"projectId": os.environ["POLPO_PROJECT_ID"], "provider": "custom-up", "key": "k", "baseUrl": f"{UPSTREAM}/v1"}
    status, _ = call("POST", f"{URL}/byok", provider, os.environ["POLPO_ADMIN_TOKEN"])
    assert status in (200, 201)
    name = f"probe-{uuid.uuid4().hex[:8]}"
    status, made = call("POST", f"{URL}/agents", {"name": name, "model": "custom-up:test-model"})
    assert (status, made["name"]) == (201, name)
    yield name
    call("DELETE", f"{URL}/agents/{name}")


@pytest.fixture(scope="session")
def client():
    with OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=20) as client:
        yield client
