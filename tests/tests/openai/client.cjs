// Drives the unmodified npm package `openai` against a gateway; `http_openai.rs` starts both, with the environment of
// client.py. Ends with an exception if anything is not as it should be.
"use strict";

const assert = require("node:assert");
const { OpenAI } = require("openai");
const { VERSION } = require("openai/version");

assert.strictEqual(VERSION, "6.49.0");
const MODEL = "m";
const client = (options) =>
  new OpenAI({ baseURL: process.env.DOOR, apiKey: process.env.KEY, timeout: 30_000, ...options });
const user = (text) => [{ role: "user", content: text }];

async function raises(kind, ask, expected) {
  let answer;
  try {
    answer = await ask();
  } catch (error) {
    assert.strictEqual(error.constructor, kind, `${error.constructor.name}, not ${kind.name}: ${error.message}`);
    for (const [name, value] of Object.entries(expected ?? {})) assert.strictEqual(error[name], value, name);
    return error;
  }
  assert.fail(`no ${kind.name} but ${JSON.stringify(answer)}`);
}

async function all(stream) {
  const seen = [];
  for await (const item of stream) seen.push(item);
  return seen;
}

async function models() {
  const found = await all(client().models.list());
  assert(found.some((model) => model.id === MODEL));
  assert.strictEqual((await client().models.retrieve("default/m")).id, MODEL);
  await raises(OpenAI.NotFoundError, () => client().models.retrieve("org/mo del"), { code: "model_not_found" });
}

async function chats() {
  const asked = { model: MODEL, messages: user("say hello world"), n: 2, presence_penalty: null };
  const answer = await client().chat.completions.create(asked);
  assert.deepStrictEqual(answer.choices.map((choice) => choice.message.content), ["hello world", "hello world"]);
  assert(answer._request_id.startsWith("req-"));
  const parsed = await client().chat.completions.parse({ model: MODEL, messages: user("say hello") });
  assert.strictEqual(parsed.choices[0].message.content, "hello");
}

async function completions() {
  const answer = await client().completions.create({ model: MODEL, prompt: "say more" });
  assert.strictEqual(answer.choices[0].text, "more");
  const chunks = await all(await client().completions.create({ model: MODEL, prompt: "say one two", stream: true }));
  assert.strictEqual(chunks.map((chunk) => chunk.choices[0].text).join(""), "one two");
}

async function streams() {
  const wanted = "begin " + Array.from({ length: 300 }, (_, number) => `w${number}`).join(" ");
  for (const script of ["say", "lose", "mute"]) {
    const asked = { model: MODEL, messages: user(`${script} ${wanted}`), stream_options: { include_usage: true } };
    const chunks = await all(await client().chat.completions.create({ ...asked, stream: true }));
    assert.strictEqual(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), wanted, script);
    assert(chunks.at(-1).usage.total_tokens > 0);
    const final = await client().chat.completions.stream(asked).finalChatCompletion();
    assert.strictEqual(final.choices[0].message.content, wanted);
  }
}

async function responses() {
  const api = client().responses;
  const answer = await api.create({ model: MODEL, input: "say hello world", metadata: { order: "66" } });
  assert.deepStrictEqual([answer.status, answer.output_text], ["completed", "hello world"]);
  assert.deepStrictEqual((await api.retrieve(answer.id)).metadata, { order: "66" });
  const more = await api.create({ model: MODEL, previous_response_id: answer.id, input: user("say even more") });
  assert.strictEqual(more.output_text, "even more");
  const items = await all(api.inputItems.list(more.id));
  assert.deepStrictEqual(items.map((item) => item.content[0].text), ["say even more"]);
  let later = await api.create({ model: MODEL, input: "slow a b c", background: true });
  assert.strictEqual(later.status, "queued");
  while (["queued", "in_progress"].includes(later.status)) {
    await new Promise((done) => setTimeout(done, 50));
    later = await api.retrieve(later.id);
  }
  assert.strictEqual(later.output_text, "a b c");
  const hangs = await api.create({ model: MODEL, input: "hang", background: true });
  assert.strictEqual((await api.cancel(hangs.id)).status, "cancelled");
  await api.delete(answer.id);
  await raises(OpenAI.NotFoundError, () => api.retrieve(answer.id), { code: "job_not_found" });
}

async function responseStreams() {
  const api = client().responses;
  const wanted = "begin " + Array.from({ length: 20 }, (_, number) => `w${number}`).join(" ");
  for (const script of ["say", "lose", "mute"]) {
    const final = await api.stream({ model: MODEL, input: `${script} ${wanted}` }).finalResponse();
    assert.strictEqual(final.output_text, wanted, script);
  }
  const seen = [];
  const stream = await api.create({ model: MODEL, input: `slow ${wanted}`, background: true, stream: true });
  for await (const event of stream) {
    seen.push(event);
    if (seen.length === 6) break;
  }
  const after = seen.at(-1).sequence_number;
  seen.push(...(await all(await api.retrieve(seen[0].response.id, { stream: true, starting_after: after }))));
  assert.strictEqual(seen.map((event) => event.delta ?? "").join(""), wanted);
  assert.strictEqual(seen.at(-1).type, "response.completed");
}

async function errors() {
  const chat = (text, options) => client(options).chat.completions.create({ model: MODEL, messages: user(text) });
  const once = { maxRetries: 0 };
  await raises(OpenAI.BadRequestError, () => chat("nonsense"), { code: "invalid_request", status: 400 });
  await raises(OpenAI.AuthenticationError, () => chat("say x", { apiKey: "wrong" }), { code: "invalid_api_key" });
  await raises(OpenAI.PermissionDeniedError, () => chat("say x", { apiKey: process.env.LISTER }),
    { code: "insufficient_permissions" });
  await raises(OpenAI.NotFoundError, () => client().embeddings.create({ model: MODEL, input: "x" }),
    { code: "unknown_url" });
  await raises(OpenAI.APIConnectionError, () => chat("say x", { baseURL: process.env.CLOSED, ...once }));
  await raises(OpenAI.APIConnectionTimeoutError, () => chat("hang", { timeout: 500, ...once }));
  const late = { defaultHeaders: { "millrace-deadline": "1s" } };
  await raises(OpenAI.InternalServerError, () => chat("hang", late), { code: "deadline_exceeded", status: 504 });
}

async function retries() {
  const counted = () => {
    const counts = [];
    const counting = (url, init) => {
      counts.push(new Headers(init.headers).get("x-stainless-retry-count"));
      return fetch(url, init);
    };
    return [counts, counting];
  };
  const [never, fetchNever] = counted();
  await raises(OpenAI.InternalServerError, () => client({ fetch: fetchNever }).chat.completions.create(
    { model: MODEL, messages: user("fail") }), { code: "inference_error" });
  assert.deepStrictEqual(never, ["0"], "what trying again cannot help is not tried again");
  const [again, fetchAgain] = counted();
  const began = Date.now();
  await raises(OpenAI.InternalServerError, () => client({ fetch: fetchAgain, maxRetries: 1 }).chat.completions.create(
    { model: process.env.FULL, messages: user("say x") }), { code: "queue_full", status: 503 });
  assert.deepStrictEqual(again, ["0", "1"]);
  assert(Date.now() - began >= 10_000, "it waits for as long as it is told");
}

(async () => {
  for (const test of [models, chats, completions, streams, responses, responseStreams, errors, retries]) {
    await test();
    console.log(`${test.name}: as it should be`);
  }
})();
