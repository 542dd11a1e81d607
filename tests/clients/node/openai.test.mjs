// The official OpenAI SDK for Node against a running server.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { apiKey, askedOfUpstream, baseURL, call, probe, testKey } from "./setup.mjs";

const model = probe("node");
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 20_000 });
const chat = client.chat.completions;
const say = (content) => [{ role: "user", content }];
const tools = [{ type: "function", function: {
  name: "get_weather", description: "The weather of a city",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } } }];
const everyWay = [false, true];

async function all(stream) {
  const chunks = [];
  for await (const chunk of await stream) chunks.push(chunk);
  return chunks;
}
const said = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? "").join("");

test("plain chat", async () => {
  const { data, response } = await chat.create({ model, messages: say("Hello") }).withResponse();
  assert.equal(data.choices[0].message.content, "Hello from upstream: Hello");
  assert.equal(data.choices[0].finish_reason, "stop");
  assert.equal(data.object, "chat.completion");
  assert.equal(data.usage.completion_tokens, 4);
  assert.equal(data.usage.total_tokens, data.usage.prompt_tokens + 4);
  assert.match(response.headers.get("x-session-id"), /^sess_/);
  assert.ok(data._request_id);
});

test("the offline agent", async () => {
  const answer = await chat.create({ model: "gpt-5", agent: "assistant", messages: say("Hello") });
  assert.match(answer.choices[0].message.content, /offline model/);
});

test("streamed chat", async () => {
  const chunks = await all(chat.create({ model, messages: say("one two three"), stream: true }));
  assert.equal(said(chunks), "Hello from upstream: one two three");
  assert.ok(chunks.length > 4, "in pieces");
  assert.equal(chunks[0].choices[0].delta.role, "assistant");
  assert.equal(chunks.at(-1).choices[0].finish_reason, "stop");
  assert.ok(chunks.every((chunk) => !chunk.usage));
});

test("usage in a stream", async () => {
  const chunks = await all(chat.create({ model, messages: say("one two three"), stream: true, stream_options: { include_usage: true } }));
  const last = chunks.pop();
  assert.ok(chunks.every((chunk) => chunk.choices.length === 1 && chunk.usage === null));
  assert.deepEqual(last.choices, []);
  assert.equal(last.usage.completion_tokens, 6);
  assert.equal(last.usage.total_tokens, last.usage.prompt_tokens + 6);
});

test("leaving stops the model", async () => {
  const marker = `SLOW ${crypto.randomUUID()}`;
  for await (const _ of await chat.create({ model, messages: say(marker), stream: true })) break;
  let outcome = "running";
  for (let tries = 0; outcome === "running" && tries < 200; tries++) {
    await new Promise((resolve) => setTimeout(resolve, 50));
    [{ outcome }] = await askedOfUpstream(marker);
  }
  assert.equal(outcome, "left");
});

for (const streamed of everyWay) {
  for (const [text, cities] of [["CALL weather", ["Turin"]], ["CALL weather twice", ["Turin", "Rome"]]]) {
    test(`${text} and back, ${streamed ? "streamed" : "plain"}`, async () => {
      const messages = say(text);
      const choice = async () => {
        const request = { model, messages, tools };
        const answer = streamed ? await chat.stream(request).finalChatCompletion() : await chat.create(request);
        return answer.choices[0];
      };
      const called = await choice();
      assert.equal(called.finish_reason, "tool_calls");
      const calls = called.message.tool_calls;
      assert.deepEqual(calls.map((call) => [call.function.name, JSON.parse(call.function.arguments)]), cities.map((city) => ["get_weather", { city }]));
      messages.push(called.message, ...calls.map(({ id }) => ({ role: "tool", tool_call_id: id, content: "21" })));
      const answered = await choice();
      assert.equal(answered.finish_reason, "stop");
      assert.equal(answered.message.content, "It is 21 degrees in Turin.");
    });
  }

  test(`a tool that the SDK runs, ${streamed ? "streamed" : "plain"}`, async () => {
    const asked = [];
    const run = ({ city }) => (asked.push(city), "21");
    const runner = chat.runTools({ model, messages: say("CALL weather"), stream: streamed,
      tools: [{ type: "function", function: { ...tools[0].function, parse: JSON.parse, function: run } }] });
    assert.equal(await runner.finalContent(), "It is 21 degrees in Turin.");
    assert.deepEqual(asked, ["Turin"]);
  });
}

const Weather = z.object({ city: z.string(), degrees: z.number(), wind: z.object({ direction: z.enum(["north", "south"]) }).nullable() });
const WEATHER = { city: "Turin", degrees: 21, wind: { direction: "north" } };
const response_format = zodResponseFormat(Weather, "weather");

test("structured output", async () => {
  const answer = await chat.parse({ model, messages: say("Where?"), response_format });
  assert.deepEqual(answer.choices[0].message.parsed, WEATHER);
  const streamed = await chat.stream({ model, messages: say("Where?"), response_format }).finalChatCompletion();
  assert.deepEqual(streamed.choices[0].message.parsed, WEATHER);
  const object = await chat.create({ model, messages: say("Where?"), response_format: { type: "json_object" } });
  assert.deepEqual(JSON.parse(object.choices[0].message.content), { city: "Turin", degrees: 21 });
});

test("output of the wrong form", async () => {
  // Wrong once: the server has it repaired.
  const answer = await chat.parse({ model, messages: say("WRONG"), response_format });
  assert.deepEqual(answer.choices[0].message.parsed, WEATHER);
  await assert.rejects(chat.parse({ model, messages: say("ALWAYS WRONG"), response_format }), (error) =>
    error instanceof OpenAI.InternalServerError && error.status === 502 && /response_format/.test(error.message));
  await assert.rejects(all(chat.create({ model, messages: say("WRONG"), response_format, stream: true })), /response_format/);
});

test("a session goes on", async () => {
  const turn = async (text, session, stream = false) => {
    const headers = session && { "x-session-id": session };
    const { data, response } = await chat.create({ model, messages: say(text), stream }, { headers }).withResponse();
    return [response.headers.get("x-session-id"), stream ? said(await all(data)) : data.choices[0].message.content];
  };
  const [session] = await turn("my name is Ada");
  assert.deepEqual(await turn("I live in Turin", session, true), [session, "Hello from upstream: I live in Turin"]);
  assert.deepEqual(await turn("RECALL", session), [session, "You said: my name is Ada | I live in Turin | RECALL"]);
  const [other, answer] = await turn("RECALL");
  assert.notEqual(other, session);
  assert.equal(answer, "You said: RECALL");
});

test("models", async () => {
  const ids = [];
  for await (const { id } of client.models.list()) ids.push(id);
  assert.ok(ids.includes(model) && ids.includes("assistant"));
  assert.equal((await client.models.retrieve(model)).id, model);
  await assert.rejects(client.models.retrieve("ghost"), (error) => error instanceof OpenAI.NotFoundError && /ghost/.test(error.message));
});

test("the sandbox is another world", async () => {
  const sandbox = new OpenAI({ baseURL, apiKey: testKey, maxRetries: 0 });
  await assert.rejects(sandbox.chat.completions.create({ model, messages: say("hi") }), OpenAI.NotFoundError);
});

for (const stream of everyWay) {
  const way = stream ? "streamed" : "plain";
  const ask = (text, more) => chat.create({ model, messages: say(text), stream, ...more });
  const stranger = (key, headers) => new OpenAI({ baseURL, apiKey: key, maxRetries: 0, defaultHeaders: headers }).chat.completions;
  for (const [name, run, type, status, code, needle] of [
    ["an unknown key", () => stranger("sk_live_unknown").create({ model, messages: say("hi"), stream }), OpenAI.AuthenticationError, 401, "invalid_api_key", /key/],
    ["no key", () => stranger("unused", { authorization: null }).create({ model, messages: say("hi"), stream }), OpenAI.AuthenticationError, 401, "unauthorized", /key/],
    ["an unknown agent", () => ask("hi", { model: "ghost" }), OpenAI.NotFoundError, 404, "not_found", /Agent "ghost" not found/],
    ["no messages", () => ask("hi", { messages: [] }), OpenAI.BadRequestError, 400, "bad_request", /messages/],
    ["a wild temperature", () => ask("hi", { temperature: 3 }), OpenAI.BadRequestError, 400, "bad_request", /temperature/],
    ["a conversation too long", () => ask("CONTEXT"), OpenAI.BadRequestError, 400, "bad_request", /too long/],
    ["a provider's refusal of its key", () => ask("STATUS 401"), OpenAI.InternalServerError, 502, "provider_error", /refused its key/],
    ["a provider's limit", () => ask("STATUS 429"), OpenAI.RateLimitError, 429, "rate_limited", /limiting/],
    ["a provider's failure", () => ask("STATUS 500"), OpenAI.InternalServerError, 502, "provider_error", /unavailable/],
  ]) {
    test(`${name} is an error with its message, ${way}`, async () => {
      await assert.rejects(run, (error) => {
        assert.ok(error instanceof type, error);
        assert.equal(error.status, status);
        assert.equal(error.code, code);
        assert.match(error.message, needle);
        assert.doesNotMatch(error.message, /^\d+ "|sk-hidden/);
        return true;
      });
    });
  }
}

for (const text of ["CUT after these words please", "FAIL after these words please"]) {
  test(`${text.split(" ")[0]} within a stream is raised`, async () => {
    const chunks = [];
    await assert.rejects(async () => {
      for await (const chunk of await chat.create({ model, messages: say(text), stream: true })) chunks.push(chunk);
    }, (error) => error instanceof OpenAI.APIError && error.code === "provider_error" && /provider/.test(error.message));
    assert.equal(said(chunks), "Hello from upstream: ");
    await assert.rejects(chat.create({ model, messages: say(text) }), (error) => error.status === 502);
  });
}

test("too many requests", { skip: !process.env.RATE_LIMITED_KEY && "RATE_LIMITED_KEY is not set" }, async () => {
  const key = process.env.RATE_LIMITED_KEY;
  const hasty = new OpenAI({ baseURL, apiKey: key, maxRetries: 0 });
  let refused;
  for (let round = 0; round < 40 && !refused; round++) {
    const crowd = Array.from({ length: 20 }, () => call("GET", "/models", undefined, key));
    refused = await hasty.models.list().then(() => undefined, (error) => error);
    await Promise.all(crowd);
  }
  assert.ok(refused instanceof OpenAI.RateLimitError, refused);
  assert.equal(refused.code, "rate_limited");
  assert.match(refused.message, /Too many requests/);
  assert.ok(Number(refused.headers.get("retry-after")) >= 1);
  assert.ok((await new OpenAI({ baseURL, apiKey: key, maxRetries: 5 }).models.list()).data.length > 0, "an SDK left to itself waits");
});
