// The official OpenAI SDK for Node against a running server.
import assert from "node:assert/strict";
import { before, test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const { POLPO_URL: baseURL, POLPO_API_KEY: apiKey } = process.env;
const model = `node-${process.pid}`;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const say = (content) => [{ role: "user", content }];
const tools = [{ type: "function", function: {
  name: "get_weather", parameters: { type: "object", properties: { city: { type: "string" } } } } }];

before(async () => {
  const answer = await fetch(`${baseURL}/agents`, {
    method: "POST", headers: { authorization: `Bearer ${apiKey}`, "content-type": "application/json" },
    body: JSON.stringify({ name: model, model: "openai:up" }),
  });
  assert.equal(answer.status, 201);
});

test("plain chat", async () => {
  const { data, response } = await client.chat.completions.create({ model, messages: say("Hello") }).withResponse();
  assert.equal(data.choices[0].message.content, "Hello from upstream: Hello");
  assert.equal(data.usage.total_tokens, 17);
  assert.match(response.headers.get("x-session-id"), /^sess_/);
});

test("streamed chat and usage", async () => {
  const stream = await client.chat.completions.create({
    model, messages: say("one two"), stream: true, stream_options: { include_usage: true } });
  let text = "", usage;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, "Hello from upstream: one two");
  assert.equal(usage.total_tokens, 17);
});

test("a tool call and back, run by the SDK", async () => {
  const runner = client.chat.completions.runTools({
    model, messages: say("What is the weather?"),
    tools: [{ type: "function", function: { ...tools[0].function, parse: JSON.parse, function: async ({ city }) => (city === "Turin" ? "21" : "?") } }],
  });
  assert.equal(await runner.finalContent(), "It is 21 degrees.");
});

test("a streamed tool call", async () => {
  const answer = await client.chat.completions.stream({ model, messages: say("weather?"), tools }).finalChatCompletion();
  assert.equal(answer.choices[0].finish_reason, "tool_calls");
  assert.deepEqual(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments), { city: "Turin" });
});

test("structured output", async () => {
  const format = zodResponseFormat(z.object({ city: z.string(), degrees: z.number() }), "city");
  const answer = await client.chat.completions.parse({ model, messages: say("Where?"), response_format: format });
  assert.deepEqual(answer.choices[0].message.parsed, { city: "Turin", degrees: 21 });
});

test("models", async () => {
  const ids = [];
  for await (const { id } of client.models.list()) ids.push(id);
  assert.ok(ids.includes(model));
  assert.equal((await client.models.retrieve(model)).id, model);
});

test("each class of error", async () => {
  const cases = [
    [() => new OpenAI({ baseURL, apiKey: "sk_live_no", maxRetries: 0 }).models.list(), OpenAI.AuthenticationError, "invalid_api_key"],
    [() => client.chat.completions.create({ model: "ghost", messages: say("x") }), OpenAI.NotFoundError, "not_found"],
    [() => client.chat.completions.create({ model, messages: [] }), OpenAI.BadRequestError, "bad_request"],
    [() => client.chat.completions.create({ model, messages: say("STATUS 429") }), OpenAI.RateLimitError, "rate_limited"],
    [() => client.chat.completions.create({ model, messages: say("STATUS 500") }), OpenAI.InternalServerError, "provider_error"],
  ];
  for (const [run, type, code] of cases) {
    await assert.rejects(async () => run(), (error) => error instanceof type && error.code === code && error.message.length > 10);
  }
});

test("a cut is raised with its reason", async () => {
  const stream = await client.chat.completions.create({ model, messages: say("CUT after these words"), stream: true });
  await assert.rejects(async () => { for await (const _ of stream); }, (error) => error.code === "provider_error");
});
