// Webhooks of a running server, verified by the official OpenAI SDK for Node.
import assert from "node:assert/strict";
import { createServer } from "node:http";
import { test } from "node:test";
import OpenAI from "openai";
import { apiKey, baseURL, call, probe } from "./setup.mjs";

const agent = probe("webhooks");
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 20_000 });

test("a delivery is what the SDK takes for genuine", { timeout: 30_000 }, async () => {
  const posts = [];
  let arrived = () => {};
  const server = createServer(async (request, response) => {
    let body = "";
    for await (const piece of request) body += piece;
    posts.push([body, request.headers]);
    response.writeHead(204).end();
    arrived();
  });
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  const next = async () => {
    while (posts.length === 0) await new Promise((resolve) => (arrived = resolve));
    return posts.shift();
  };
  const url = `http://127.0.0.1:${server.address().port}/hook`;
  const [made, hook] = await call("POST", "/webhooks", { url, events: ["task:created"] });
  assert.equal(made, 201);
  try {
    const [, task] = await call("POST", "/tasks", { title: `t ${process.pid}`, description: "d", assignTo: agent, draft: true });
    const [body, headers] = await next();
    const event = await client.webhooks.unwrap(body, headers, hook.secret);
    assert.equal(event.type, "task:created");
    assert.equal(event.data.taskId, task.id);
    assert.match(event.id, /^evt_/);
    await client.webhooks.verifySignature(body, headers, hook.secret);
    await assert.rejects(client.webhooks.unwrap(`${body} `, headers, hook.secret), OpenAI.InvalidWebhookSignatureError);
    const [, rotated] = await call("POST", `/webhooks/${hook.id}/rotate-secret`, {});
    await call("POST", `/webhooks/${hook.id}/deliveries/${headers["webhook-id"]}/redeliver`, {});
    const [again, signed] = await next();
    assert.equal(again, body);
    for (const secret of [hook.secret, rotated.secret]) assert.equal((await client.webhooks.unwrap(again, signed, secret)).id, event.id);
    await call("DELETE", `/tasks/${task.id}`);
  } finally {
    await call("DELETE", `/webhooks/${hook.id}`);
    server.close();
  }
});
