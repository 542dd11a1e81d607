"""The official OpenAI SDK for Python against a running server."""

import json
import os
import urllib.request
import uuid

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

URL = os.environ["POLPO_URL"]
KEY = os.environ["POLPO_API_KEY"]
AGENT = f"python-{uuid.uuid4().hex[:8]}"
HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}}]


@pytest.fixture(scope="module")
def client():
    agent = json.dumps({"name": AGENT, "model": "openai:up"}).encode()
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{URL}/agents", agent, headers)) as answer:
        assert answer.status == 201
    return OpenAI(base_url=URL, api_key=KEY, max_retries=0)


def ask(client, text, **more):
    return client.chat.completions.create(model=AGENT, messages=[{"role": "user", "content": text}], **more)


def test_plain_chat(client):
    answer = ask(client, "Hello")
    assert answer.choices[0].message.content == "Hello from upstream: Hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == 17
    assert answer.model == AGENT


def test_the_offline_agent(client):
    answer = client.chat.completions.create(model="assistant", messages=HELLO)
    assert "offline model" in answer.choices[0].message.content


def test_streamed_chat_and_usage(client):
    chunks = list(ask(client, "one two three", stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Hello from upstream: one two three"
    assert chunks[-1].usage.total_tokens == 17
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"


def test_the_stream_helper(client):
    with client.chat.completions.stream(model=AGENT, messages=HELLO) as stream:
        kinds = {event.type for event in stream}
        assert {"content.delta", "content.done"} <= kinds
        assert stream.get_final_completion().choices[0].message.content == "Hello from upstream: Hello"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_call_and_back(client, streamed):
    messages = [{"role": "user", "content": "What is the weather?"}]
    if streamed:
        with client.chat.completions.stream(model=AGENT, messages=messages, tools=TOOLS) as stream:
            stream.until_done()
            choice = stream.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(model=AGENT, messages=messages, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Turin"})
    messages += [choice.message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}),
                 {"role": "tool", "tool_call_id": call.id, "content": "21"}]
    answer = client.chat.completions.create(model=AGENT, messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "It is 21 degrees."


class City(BaseModel):
    city: str
    degrees: int


def test_structured_output(client):
    answer = client.chat.completions.parse(model=AGENT, messages=HELLO, response_format=City)
    assert answer.choices[0].message.parsed == City(city="Turin", degrees=21)
    # Wrong once: the server has it repaired.
    repaired = client.chat.completions.parse(model=AGENT, messages=[{"role": "user", "content": "WRONG"}], response_format=City)
    assert repaired.choices[0].message.parsed == City(city="Turin", degrees=21)
    with pytest.raises(openai.InternalServerError) as failure:
        client.chat.completions.parse(model=AGENT, messages=[{"role": "user", "content": "ALWAYS WRONG"}], response_format=City)
    assert "response_format" in failure.value.message


def test_a_session_goes_on(client):
    first = client.chat.completions.with_raw_response.create(model="assistant", messages=HELLO)
    session = first.headers["x-session-id"]
    again = client.chat.completions.with_raw_response.create(model="assistant", messages=HELLO, extra_headers={"x-session-id": session})
    assert again.headers["x-session-id"] == session
    assert first.headers["x-request-id"] != again.headers["x-request-id"]


def test_models(client):
    assert AGENT in [model.id for model in client.models.list()]
    assert client.models.retrieve(AGENT).id == AGENT


@pytest.mark.parametrize(("text", "error", "code", "needle"), [
    ("STATUS 400", openai.BadRequestError, "bad_request", "That model cannot do that"),
    ("TOO LONG", openai.BadRequestError, "bad_request", "too long"),
    ("STATUS 401", openai.InternalServerError, "provider_error", "refused its key"),
    ("STATUS 429", openai.RateLimitError, "rate_limited", "limiting"),
    ("STATUS 500", openai.InternalServerError, "provider_error", "unavailable"),
])
@pytest.mark.parametrize("stream", [False, True])
def test_a_providers_trouble(client, text, error, code, needle, stream):
    with pytest.raises(error) as failure:
        ask(client, text, stream=stream)
    assert (failure.value.code, needle in failure.value.message) == (code, True), failure.value.message
    assert "sk-hidden" not in str(failure.value)


def test_a_cut_is_raised_with_its_reason(client):
    with pytest.raises(openai.APIError) as failure:
        for _ in ask(client, "CUT after these words please", stream=True):
            pass
    assert "provider" in failure.value.message


def test_our_own_errors(client):
    stranger = OpenAI(base_url=URL, api_key="sk_live_unknown", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as failure:
        ask(stranger, "hi")
    assert failure.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as failure:
        client.chat.completions.create(model="ghost", messages=HELLO)
    assert 'Agent "ghost" not found' in failure.value.message
    with pytest.raises(openai.BadRequestError) as failure:
        ask(client, "hi", temperature=3)
    assert failure.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("ghost")
