// Vercel's AI SDK through @ai-sdk/openai-compatible against a running server.
import assert from "node:assert/strict";
import { before, test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const { POLPO_URL: baseURL, POLPO_API_KEY: apiKey } = process.env;
const name = `vercel-${process.pid}`;
const provider = createOpenAICompatible({ name: "polpo", baseURL, apiKey, includeUsage: true, supportsStructuredOutputs: true });
const model = provider(name);

before(async () => {
  const answer = await fetch(`${baseURL}/agents`, {
    method: "POST", headers: { authorization: `Bearer ${apiKey}`, "content-type": "application/json" },
    body: JSON.stringify({ name, model: "openai:up" }),
  });
  assert.equal(answer.status, 201);
});

test("plain chat and usage", async () => {
  const { text, usage, finishReason } = await generateText({ model, prompt: "Hello", maxRetries: 0 });
  assert.equal(text, "Hello from upstream: Hello");
  assert.equal(usage.totalTokens, 17);
  assert.equal(finishReason, "stop");
});

test("streamed chat and usage", async () => {
  const result = streamText({ model, prompt: "one two", maxRetries: 0 });
  let text = "";
  for await (const piece of result.textStream) text += piece;
  assert.equal(text, "Hello from upstream: one two");
  assert.equal((await result.usage).totalTokens, 17);
  assert.equal(await result.finishReason, "stop");
});

const tools = { get_weather: tool({ description: "Weather", inputSchema: z.object({ city: z.string() }), execute: async ({ city }) => (city === "Turin" ? 21 : 0) }) };

test("a tool call and back", async () => {
  const { text } = await generateText({ model, tools, stopWhen: stepCountIs(3), prompt: "What is the weather?", maxRetries: 0 });
  assert.equal(text, "It is 21 degrees.");
});

test("a streamed tool call and back", async () => {
  const result = streamText({ model, tools, stopWhen: stepCountIs(3), prompt: "What is the weather?", maxRetries: 0 });
  assert.equal(await result.text, "It is 21 degrees.");
});

test("structured output", async () => {
  const { output } = await generateText({ model, prompt: "Where?", maxRetries: 0, output: Output.object({ schema: z.object({ city: z.string(), degrees: z.number() }) }) });
  assert.deepEqual(output, { city: "Turin", degrees: 21 });
});

test("each class of error tells its message", async () => {
  const ask = (model, prompt) => generateText({ model, prompt, maxRetries: 0 });
  const stranger = createOpenAICompatible({ name: "polpo", baseURL, apiKey: "sk_live_no" })(name);
  for (const [run, status, needle] of [
    [() => ask(stranger, "x"), 401, "key"],
    [() => ask(provider("ghost"), "x"), 404, "ghost"],
    [() => ask(model, "STATUS 400"), 400, "cannot do that"],
    [() => ask(model, "STATUS 429"), 429, "limiting"],
    [() => ask(model, "STATUS 500"), 502, "unavailable"],
  ]) {
    await assert.rejects(run, (error) => APICallError.isInstance(error) && error.statusCode === status && error.message.includes(needle));
  }
});

test("a cut is told in the stream", async () => {
  const errors = [];
  const result = streamText({ model, prompt: "CUT after these words", maxRetries: 0, onError: ({ error }) => errors.push(error) });
  await result.consumeStream();
  assert.equal(errors.length, 1);
  assert.match(JSON.stringify(errors[0]) + String(errors[0]?.message), /provider/);
});
