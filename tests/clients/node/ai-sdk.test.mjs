// Vercel's AI SDK through @ai-sdk/openai-compatible against a running server.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";
import { apiKey, askedOfUpstream, baseURL, probe } from "./setup.mjs";

const name = probe("vercel");
const open = (key) => createOpenAICompatible({ name: "polpo", baseURL, apiKey: key, includeUsage: true, supportsStructuredOutputs: true });
const provider = open(apiKey);
const model = provider(name);
const whole = { model, maxRetries: 0 };
// Errors go to the test, not to the console.
const streamed = { ...whole, onError() {} };

test("plain chat and usage", async () => {
  const { text, usage, finishReason } = await generateText({ ...whole, prompt: "Hello" });
  assert.equal(text, "Hello from upstream: Hello");
  assert.equal(usage.outputTokens, 4);
  assert.equal(usage.totalTokens, usage.inputTokens + 4);
  assert.equal(finishReason, "stop");
});

test("the offline agent", async () => {
  const { text } = await generateText({ model: provider("assistant"), maxRetries: 0, prompt: "Hello" });
  assert.match(text, /offline model/);
});

test("streamed chat and usage", async () => {
  const result = streamText({ ...streamed, prompt: "one two three" });
  const pieces = [];
  for await (const piece of result.textStream) pieces.push(piece);
  assert.equal(pieces.join(""), "Hello from upstream: one two three");
  assert.ok(pieces.length > 3, "in pieces");
  const usage = await result.usage;
  assert.equal(usage.outputTokens, 6);
  assert.equal(usage.totalTokens, usage.inputTokens + 6);
  assert.equal(await result.finishReason, "stop");
});

test("leaving stops the model", async () => {
  const marker = `SLOW ${crypto.randomUUID()}`;
  const leave = new AbortController();
  const result = streamText({ ...streamed, prompt: marker, abortSignal: leave.signal });
  for await (const _ of result.textStream) leave.abort();
  let outcome = "running";
  for (let tries = 0; outcome === "running" && tries < 200; tries++) {
    await new Promise((resolve) => setTimeout(resolve, 50));
    [{ outcome }] = await askedOfUpstream(marker);
  }
  assert.equal(outcome, "left");
});

function weather() {
  const asked = [];
  const execute = async ({ city }) => (asked.push(city), 21);
  return [asked, { get_weather: tool({ description: "The weather of a city", inputSchema: z.object({ city: z.string() }), execute }) }];
}

for (const [prompt, cities] of [["CALL weather", ["Turin"]], ["CALL weather twice", ["Turin", "Rome"]]]) {
  test(`${prompt} and back, plain`, async () => {
    const [asked, tools] = weather();
    const { text, steps } = await generateText({ ...whole, tools, stopWhen: isStepCount(3), prompt });
    assert.equal(text, "It is 21 degrees in Turin.");
    assert.deepEqual(asked, cities);
    assert.deepEqual(steps.map((step) => step.finishReason), ["tool-calls", "stop"]);
  });

  test(`${prompt} and back, streamed`, async () => {
    const [asked, tools] = weather();
    const result = streamText({ ...streamed, tools, stopWhen: isStepCount(3), prompt });
    let pieces = 0;
    for await (const part of result.fullStream) pieces += part.type === "tool-input-delta";
    assert.equal(await result.text, "It is 21 degrees in Turin.");
    assert.deepEqual(asked, cities);
    assert.ok(pieces > cities.length, "arguments come in pieces");
  });
}

const Weather = z.object({ city: z.string(), degrees: z.number(), wind: z.object({ direction: z.enum(["north", "south"]) }).nullable() });
const WEATHER = { city: "Turin", degrees: 21, wind: { direction: "north" } };
const output = Output.object({ schema: Weather });

test("structured output", async () => {
  assert.deepEqual((await generateText({ ...whole, output, prompt: "Where?" })).output, WEATHER);
  const result = streamText({ ...streamed, output, prompt: "Where?" });
  let last;
  for await (const part of result.partialOutputStream) last = part;
  assert.deepEqual(last, WEATHER);
  // Wrong once: the server has it repaired.
  assert.deepEqual((await generateText({ ...whole, output, prompt: "WRONG" })).output, WEATHER);
  await assert.rejects(generateText({ ...whole, output, prompt: "ALWAYS WRONG" }), (error) =>
    APICallError.isInstance(error) && error.statusCode === 502 && /response_format/.test(error.message));
});

test("a session goes on", async () => {
  const turn = async (prompt, session) => {
    const { text, response } = await generateText({ ...whole, prompt, headers: session && { "x-session-id": session } });
    return [response.headers["x-session-id"], text];
  };
  const [session] = await turn("my name is Ada");
  assert.match(session, /^sess_/);
  const result = streamText({ ...streamed, prompt: "I live in Turin", headers: { "x-session-id": session } });
  await result.consumeStream();
  assert.equal((await result.response).headers["x-session-id"], session);
  assert.deepEqual(await turn("RECALL", session), [session, "You said: my name is Ada | I live in Turin | RECALL"]);
  assert.equal((await turn("RECALL"))[1], "You said: RECALL");
});

for (const [what, whom, prompt, more, status, needle] of [
  ["an unknown key", open("sk_live_unknown")(name), "x", {}, 401, /key/],
  ["no key", open()(name), "x", {}, 401, /key/],
  ["an unknown agent", provider("ghost"), "x", {}, 404, /Agent "ghost" not found/],
  ["a wild temperature", model, "x", { temperature: 3 }, 400, /temperature/],
  ["a conversation too long", model, "CONTEXT", {}, 400, /too long/],
  ["a provider's refusal of its key", model, "STATUS 401", {}, 502, /refused its key/],
  ["a provider's limit", model, "STATUS 429", {}, 429, /limiting/],
  ["a provider's failure", model, "STATUS 500", {}, 502, /unavailable/],
]) {
  const request = { model: whom, prompt, maxRetries: 0, ...more };
  const tells = (error) => {
    assert.ok(APICallError.isInstance(error), error);
    assert.equal(error.statusCode, status);
    assert.match(error.message, needle);
    return true;
  };
  test(`${what} is an error with its message, plain`, async () => {
    await assert.rejects(generateText(request), tells);
  });
  // `streamText` calls itself `ai-sdk-openai-compatible/…`, without the `ai/…` of `generateText`.
  test(`${what} is an error with its message, streamed`, async () => {
    const errors = [];
    await streamText({ ...request, onError: ({ error }) => errors.push(error) }).consumeStream();
    assert.equal(errors.length, 1);
    tells(errors[0]);
  });
}

for (const prompt of ["CUT after these words please", "FAIL after these words please"]) {
  test(`${prompt.split(" ")[0]} within a stream is told`, async () => {
    const errors = [];
    let text = "";
    const result = streamText({ ...whole, prompt, onError: ({ error }) => errors.push(error) });
    for await (const part of result.fullStream) if (part.type === "text-delta") text += part.text;
    assert.equal(text, "Hello from upstream: ");
    assert.equal(errors.length, 1);
    assert.match(String(errors[0]?.message ?? errors[0]), /provider/);
  });
}
