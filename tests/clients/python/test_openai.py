"""The official OpenAI SDK for Python against a running server."""

import asyncio
import json
import os
import threading
import time
import urllib.error
import uuid
from typing import Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from conftest import KEY, URL, asked_of_upstream, call

TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}}]


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture
def ask(client, agent):
    def ask(text, **more):
        return client.chat.completions.create(model=agent, messages=[user(text)], **more)
    return ask


def said(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# Chat


def test_plain_chat(ask, agent):
    answer = ask("Hello")
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason) == (0, "stop")
    assert (choice.message.role, choice.message.content, choice.message.tool_calls) == ("assistant", "Hello from upstream: Hello", None)
    assert (answer.object, answer.model) == ("chat.completion", agent)
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 120
    usage = answer.usage
    assert usage.completion_tokens == 4
    assert usage.prompt_tokens > 0 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_the_agent_may_be_named_as_the_api_has_it(client, agent):
    answer = client.chat.completions.create(model="gpt-5", messages=[user("Hello")], extra_body={"agent": agent})
    assert answer.choices[0].message.content == "Hello from upstream: Hello"


def test_the_offline_agent(client):
    answer = client.chat.completions.create(model="assistant", messages=[user("Hello")])
    assert "offline model" in answer.choices[0].message.content
    assert answer.usage.total_tokens > 0


def test_every_form_of_message_is_understood(client, agent):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        user("first"),
        {"role": "assistant", "content": "Hello from upstream: first"},
        user([{"type": "text", "text": "RECALL"}, {"type": "text", "text": "all"}]),
    ]
    answer = client.chat.completions.create(model=agent, messages=messages, temperature=0.5, max_tokens=50, user="someone", seed=7)
    assert answer.choices[0].message.content == "You said: first | RECALL\nall"


def test_the_limit_of_tokens_is_kept(ask):
    for limit in ("max_tokens", "max_completion_tokens"):
        choice = ask("one two three four", **{limit: 3}).choices[0]
        assert (choice.finish_reason, choice.message.content.split()) == ("length", ["Hello", "from", "upstream:"])


def test_streamed_chat(ask, agent):
    chunks = list(ask("one two three", stream=True))
    assert said(chunks) == "Hello from upstream: one two three"
    assert len(chunks) > 4, "in pieces"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert {(chunk.id, chunk.object, chunk.model) for chunk in chunks} == {(chunks[0].id, "chat.completion.chunk", agent)}
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_in_a_stream(ask):
    *chunks, last = ask("one two three", stream=True, stream_options={"include_usage": True})
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == 6
    assert last.usage.total_tokens == last.usage.prompt_tokens + 6
    assert last.usage.prompt_tokens == ask("one two three").usage.prompt_tokens


def test_the_stream_helper(client, agent):
    with client.chat.completions.stream(model=agent, messages=[user("Hello")]) as stream:
        kinds = {event.type for event in stream}
        assert {"chunk", "content.delta", "content.done"} <= kinds
        assert stream.get_final_completion().choices[0].message.content == "Hello from upstream: Hello"


def test_words_arrive_as_they_are_said(ask):
    arrivals = [time.monotonic() for _ in ask("SLOW", stream=True)]
    assert arrivals[-1] - arrivals[0] > 0.5


def test_leaving_stops_the_model(ask):
    marker = f"SLOW {uuid.uuid4()}"
    stream = ask(marker, stream=True)
    next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while asked_of_upstream(marker)[0]["outcome"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert asked_of_upstream(marker)[0]["outcome"] == "left"


def test_the_asynchronous_client(agent):
    async def several():
        async with AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=20) as client:
            async def one(number):
                stream = await client.chat.completions.create(model=agent, messages=[user(f"number {number}")], stream=True)
                return said([chunk async for chunk in stream])
            return await asyncio.gather(*map(one, range(5)))
    assert asyncio.run(several()) == [f"Hello from upstream: number {number}" for number in range(5)]


# Tools


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("text", "cities"), [("CALL weather", ["Turin"]), ("CALL weather twice", ["Turin", "Rome"])])
def test_a_tool_call_and_back(client, agent, streamed, text, cities):
    messages = [user(text)]

    def choice():
        if not streamed:
            return client.chat.completions.create(model=agent, messages=messages, tools=TOOLS).choices[0]
        with client.chat.completions.stream(model=agent, messages=messages, tools=TOOLS) as stream:
            return stream.until_done().get_final_completion().choices[0]

    called = choice()
    assert (called.finish_reason, called.message.content or None) == ("tool_calls", None)
    calls = called.message.tool_calls
    assert [(call.type, call.function.name, json.loads(call.function.arguments)) for call in calls] \
        == [("function", "get_weather", {"city": city}) for city in cities]
    assert len({call.id for call in calls}) == len(cities)
    messages.append(called.message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}))
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "21"} for call in calls]
    answered = choice()
    assert (answered.finish_reason, answered.message.content) == ("stop", "It is 21 degrees in Turin.")


def test_a_streamed_tool_call_comes_in_pieces(ask):
    chunks = list(ask("CALL weather", tools=TOOLS, stream=True))
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert pieces[0].id and pieces[0].function.name == "get_weather" and pieces[0].type == "function"
    assert all(piece.index == 0 for piece in pieces)
    assert [piece for piece in pieces[1:] if piece.id or piece.function.name] == []
    assert len(pieces) > 2
    assert json.loads("".join(piece.function.arguments or "" for piece in pieces)) == {"city": "Turin"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_tools_result_within_a_session(client, agent):
    first = client.chat.completions.with_raw_response.create(model=agent, messages=[user("CALL weather")], tools=TOOLS)
    [call] = first.parse().choices[0].message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "21"}
    answer = client.chat.completions.create(model=agent, messages=[result], tools=TOOLS,
                                            extra_headers={"x-session-id": first.headers["x-session-id"]})
    assert answer.choices[0].message.content == "It is 21 degrees in Turin."


def test_tool_choice_is_kept(ask):
    assert ask("CALL weather", tools=TOOLS, tool_choice="none").choices[0].message.content == "Hello from upstream: CALL weather"
    named = {"type": "function", "function": {"name": "get_weather"}}
    assert ask("CALL weather", tools=TOOLS, tool_choice=named).choices[0].finish_reason == "tool_calls"
    assert len(ask("CALL weather twice", tools=TOOLS, parallel_tool_calls=False).choices[0].message.tool_calls) == 1


# Structured output


class Wind(BaseModel):
    direction: Literal["north", "south"]
    gusts: list[int]


class Weather(BaseModel):
    city: str
    degrees: int
    wind: Wind | None


WEATHER = Weather(city="Turin", degrees=21, wind=Wind(direction="north", gusts=[21]))


def test_structured_output(client, agent):
    answer = client.chat.completions.parse(model=agent, messages=[user("Where?")], response_format=Weather)
    assert answer.choices[0].message.parsed == WEATHER


def test_streamed_structured_output(client, agent):
    with client.chat.completions.stream(model=agent, messages=[user("Where?")], response_format=Weather) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == WEATHER


def test_a_json_object(ask):
    answer = ask("Where?", response_format={"type": "json_object"})
    assert json.loads(answer.choices[0].message.content) == {"city": "Turin", "degrees": 21}


def test_output_of_the_wrong_form(client, agent):
    def parse(text):
        return client.chat.completions.parse(model=agent, messages=[user(text)], response_format=Weather).choices[0].message.parsed

    # Wrong once: the server has it repaired.
    assert parse("WRONG") == WEATHER
    with pytest.raises(openai.InternalServerError) as failure:
        parse("ALWAYS WRONG")
    assert (failure.value.status_code, failure.value.code) == (502, "provider_error")
    assert "response_format" in failure.value.message
    # What was streamed cannot be taken back: the stream ends in the error.
    with pytest.raises(openai.APIError, match="response_format"):
        with client.chat.completions.stream(model=agent, messages=[user("WRONG")], response_format={"type": "json_object"}) as stream:
            stream.until_done()


# Sessions


def test_a_session_goes_on(client, agent):
    def turn(text, session=None, stream=False):
        headers = {"x-session-id": session} if session else {}
        raw = client.chat.completions.with_raw_response.create(model=agent, messages=[user(text)], extra_headers=headers, stream=stream)
        answer = raw.parse()
        return raw.headers["x-session-id"], said(answer) if stream else answer.choices[0].message.content

    session, _ = turn("my name is Ada")
    assert session.startswith("sess_")
    assert turn("I live in Turin", session, stream=True) == (session, "Hello from upstream: I live in Turin")
    assert turn("RECALL", session) == (session, "You said: my name is Ada | I live in Turin | RECALL")
    other, answer = turn("RECALL")
    assert (other != session, answer) == (True, "You said: RECALL")
    assert turn("RECALL", "new")[0] not in (session, other)
    _, stored = call("GET", f"{URL}/chat/sessions/{session}/messages")
    assert [message["role"] for message in stored["messages"]] == ["user", "assistant"] * 3


def test_a_session_that_does_not_exist(client, agent):
    with pytest.raises(openai.NotFoundError) as failure:
        client.chat.completions.create(model=agent, messages=[user("hi")], extra_headers={"x-session-id": "sess_nowhere"})
    assert "sess_nowhere" in failure.value.message


def test_every_answer_has_its_request_id(client):
    first, second = client.models.list(), client.models.list()
    assert first._request_id and second._request_id
    assert first._request_id != second._request_id


# Models


def test_models(client, agent):
    models = {model.id: model for model in client.models.list()}
    assert {agent, "assistant"} <= set(models)
    assert (models[agent].object, type(models[agent].created)) == ("model", int)
    assert client.models.retrieve(agent).id == agent
    with pytest.raises(openai.NotFoundError, match="ghost"):
        client.models.retrieve("ghost")


def test_the_sandbox_is_another_world(agent):
    with OpenAI(base_url=URL, api_key=os.environ["POLPO_TEST_API_KEY"], max_retries=0) as sandbox:
        assert agent not in [model.id for model in sandbox.models.list()]
        with pytest.raises(openai.NotFoundError, match=agent):
            sandbox.chat.completions.create(model=agent, messages=[user("hi")])


# Errors


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("key", "code"), [("sk_live_unknown", "invalid_api_key"), ("nonsense", None), ("", "unauthorized")])
def test_a_key_that_opens_nothing(agent, key, code, stream):
    with OpenAI(base_url=URL, api_key=key or "unused", max_retries=0, default_headers={} if key else {"authorization": ""}) as stranger:
        for run in (lambda: stranger.chat.completions.create(model=agent, messages=[user("hi")], stream=stream), stranger.models.list):
            with pytest.raises(openai.AuthenticationError) as failure:
                run()
            assert failure.value.code == code if code else failure.value.code in ("unauthorized", "invalid_api_key")
            assert "key" in failure.value.message
            assert failure.value.request_id


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_that_does_not_exist(client, stream):
    with pytest.raises(openai.NotFoundError) as failure:
        client.chat.completions.create(model="ghost", messages=[user("hi")], stream=stream)
    assert 'Agent "ghost" not found' in failure.value.message
    assert failure.value.code == "not_found"


@pytest.mark.parametrize(("wish", "param"), [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "narrator", "content": "hi"}]}, "messages[0].role"),
    ({"temperature": 3}, "temperature"),
    ({"n": 2}, "n"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "poem"}}, "response_format"),
])
def test_a_request_that_cannot_be_answered(client, agent, wish, param):
    with pytest.raises(openai.BadRequestError) as failure:
        client.chat.completions.create(**{"model": agent, "messages": [user("hi")], **wish})
    assert (failure.value.code, failure.value.param) == ("bad_request", param)
    assert param.split(".")[-1] in failure.value.message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("text", "status", "error", "code", "needle"), [
    ("CONTEXT", 400, openai.BadRequestError, "bad_request", "too long"),
    ("STATUS 401", 502, openai.InternalServerError, "provider_error", "refused its key"),
    ("STATUS 429", 429, openai.RateLimitError, "rate_limited", "limiting"),
    ("STATUS 500", 502, openai.InternalServerError, "provider_error", "unavailable"),
])
def test_a_providers_trouble(ask, text, status, error, code, needle, stream):
    with pytest.raises(error) as failure:
        ask(text, stream=stream)
    assert (failure.value.status_code, failure.value.code) == (status, code)
    assert needle in failure.value.message
    assert "sk-hidden" not in str(failure.value)
    if status == 429:
        assert failure.value.response.headers["retry-after"] == "60"


@pytest.mark.parametrize("text", ["CUT after these words please", "FAIL after these words please"])
def test_trouble_within_a_stream_is_raised(ask, text):
    pieces = []
    with pytest.raises(openai.APIError) as failure:
        for chunk in ask(text, stream=True):
            pieces.append(chunk)
    assert said(pieces) == "Hello from upstream: "
    assert failure.value.code == "provider_error"
    assert "provider" in failure.value.message
    with pytest.raises(openai.InternalServerError) as failure:
        ask(text)
    assert failure.value.status_code == 502


def test_too_many_requests(agent):
    key = os.environ.get("RATE_LIMITED_KEY")
    if not key:
        pytest.skip("RATE_LIMITED_KEY is not set")
    tired = threading.Event()

    def hurry():
        for _ in range(500):
            if tired.is_set():
                return
            try:
                call("GET", f"{URL}/models", key=key)
            except urllib.error.HTTPError as refusal:
                assert refusal.code == 429

    crowd = [threading.Thread(target=hurry) for _ in range(4)]
    for one in crowd:
        one.start()
    try:
        with OpenAI(base_url=URL, api_key=key, max_retries=0) as client, pytest.raises(openai.RateLimitError) as failure:
            for _ in range(500):
                client.models.list()
    finally:
        tired.set()
        for one in crowd:
            one.join()
    assert failure.value.code == "rate_limited"
    assert "Too many requests" in failure.value.message
    headers = failure.value.response.headers
    assert int(headers["retry-after"]) >= 1
    assert int(headers["x-ratelimit-limit"]) >= 1 and headers["x-ratelimit-remaining"] == "0"
    # An SDK that is left to itself waits, and gets its answer.
    with OpenAI(base_url=URL, api_key=key, max_retries=5) as patient:
        assert patient.models.list().data


def test_who_is_no_sdk_reads_the_flat_error():
    for path, body in (("/chat/completions", {"model": "ghost", "messages": [user("hi")]}), ("/agents/ghost", None)):
        with pytest.raises(urllib.error.HTTPError) as failure:
            call("POST" if body else "GET", f"{URL}{path}", body)
        error = json.load(failure.value)
        assert failure.value.code == 404
        assert (error["code"], error["error"]) == ("not_found", 'Agent "ghost" not found')


# The server's own tools


def test_the_servers_tools_run_unseen_in_a_plain_answer_and_beside_the_words_of_a_stream(ask, agent):
    answer = ask("CALL memory")
    assert (answer.choices[0].finish_reason, answer.choices[0].message.tool_calls) == ("stop", None)
    assert answer.choices[0].message.content == "It is 21 degrees in Turin."
    assert call("GET", f"{URL}/memory/agent/{agent}")[1]["content"] == "Likes tea"

    chunks = list(ask("CALL memory", stream=True))
    told = [chunk.choices[0].model_extra["tool_call"] for chunk in chunks if "tool_call" in (chunk.choices[0].model_extra or {})]
    assert [tool["state"] for tool in told] == ["preparing", "calling", "completed"]
    assert said(chunks) == "It is 21 degrees in Turin."
    assert not any(chunk.choices[0].delta.tool_calls for chunk in chunks)
