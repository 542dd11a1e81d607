// A project's own provider, and an agent that asks it.
import assert from "node:assert/strict";
import { after, before } from "node:test";

export const { POLPO_URL: baseURL, POLPO_API_KEY: apiKey, POLPO_TEST_API_KEY: testKey, UPSTREAM_CONTROL_URL: upstream } = process.env;

export async function call(method, path, body, key = apiKey) {
  const headers = { authorization: `Bearer ${key}`, "content-type": "application/json" };
  const answer = await fetch(`${baseURL}${path}`, { method, headers, body: body && JSON.stringify(body) });
  return [answer.status, await answer.json()];
}

/** What the upstream was asked with this text, oldest first. */
export async function askedOfUpstream(text) {
  const requests = await (await fetch(`${upstream}/requests`)).json();
  return requests.filter(({ body }) => JSON.stringify(body.messages).includes(text));
}

/** An agent for the tests of one file. */
export function probe(kind) {
  const name = `probe-${kind}-${process.pid}`;
  before(async () => {
    const { POLPO_PROJECT_ID: projectId, POLPO_ADMIN_TOKEN: admin } = process.env;
    const provider = { projectId, provider: "custom-up", key: "k", baseUrl: `${upstream}/v1` };
    const [set] = await call("POST", "/byok", provider, admin);
    assert.ok(set === 200 || set === 201, `setting the provider: ${set}`);
    const [made] = await call("POST", "/agents", { name, model: "custom-up:test-model" });
    assert.equal(made, 201);
  });
  after(() => call("DELETE", `/agents/${name}`));
  return name;
}
