// npm's ollama against the server.
import assert from "node:assert/strict";
import { Ollama } from "ollama";
import { door, follows, nobodyServed, raised, report, SCHEMA, STORY, TEXT } from "./checks.mjs";

const of = (key) => new Ollama({ host: door.url, headers: { Authorization: `Bearer ${key}` } });
const client = of(door.key);
const asked = { model: door.model, messages: STORY, options: { num_predict: 13 } };
const tool = { type: "function", function: { name: "choose", description: "Chooses.", parameters: SCHEMA } };

await report({
  async models() {
    const { models } = await client.list();
    assert.deepEqual(models.map((each) => each.name), [door.model]);
    assert.equal((await client.ps()).models[0].model, door.model);
    assert.deepEqual((await client.show({ model: door.model })).capabilities, ["completion", "tools"]);
  },
  async chat() {
    const chat = await client.chat(asked);
    assert.equal(chat.message.content, TEXT);
    assert.equal(chat.done_reason, "length");
    assert.equal(chat.eval_count, 13);
    const text = { model: door.model, prompt: "Once upon a time", options: asked.options };
    assert.equal((await client.generate(text)).response, TEXT);
  },
  async stream() {
    const pieces = [];
    for await (const piece of await client.chat({ ...asked, stream: true })) pieces.push(piece.message.content);
    assert.equal(pieces.join(""), TEXT);
    assert.ok(pieces.length > 5);
  },
  async stop() {
    const stopped = await client.chat({ ...asked, options: { num_predict: 50, stop: [" named"] } });
    assert.equal(stopped.message.content, ", there was a little girl");
    const stream = await client.chat({ ...asked, options: { num_predict: 2500 }, stream: true });
    const error = await raised(
      (async () => {
        for await (const _ of stream) stream.abort();
      })(),
    );
    assert.equal(error.name, "AbortError");
    await nobodyServed();
  },
  async tools() {
    // Nothing in this dialect asks for a call, so the model only has to take what it was told of one.
    const messages = [
      ...STORY,
      { role: "assistant", content: "", tool_calls: [{ function: { name: "choose", arguments: { hero: "dog" } } }] },
      { role: "tool", tool_name: "choose", content: "a dog" },
    ];
    const chat = await client.chat({ ...asked, messages, tools: [tool] });
    assert.ok(chat.eval_count >= 1 && chat.eval_count <= 13); // rounding decides where it ends
    const alone = await client.chat(asked);
    assert.ok(chat.prompt_eval_count > alone.prompt_eval_count + 20);
  },
  async schema() {
    const options = { num_predict: 250 };
    follows((await client.chat({ ...asked, options, format: SCHEMA })).message.content);
  },
  async logprobs() {
    const wish = { ...asked, logprobs: true, top_logprobs: 2 };
    const { logprobs } = await client.chat(wish);
    assert.equal(logprobs.map((entry) => entry.token).join(""), TEXT);
    assert.ok(logprobs.every((entry) => entry.logprob <= 0 && entry.top_logprobs.length === 2));
    const streamed = [];
    for await (const piece of await client.chat({ ...wish, stream: true })) streamed.push(...(piece.logprobs ?? []));
    assert.deepEqual(streamed, logprobs);
  },
  async errors() {
    const chat = (wish) => raised(client.chat({ ...asked, ...wish }));
    const unknown = await chat({ model: "gpt" });
    assert.equal(unknown.name, "ResponseError");
    assert.equal(unknown.status_code, 404);
    const refused = await chat({ options: { mirostat: 2 } });
    assert.equal(refused.status_code, 400);
    assert.match(refused.message, /mirostat is not supported/);
    const embedding = await raised(client.embed({ model: door.model, input: "text" }));
    assert.match(embedding.message, /has no embeddings/);
    assert.equal((await raised(of("another").list())).status_code, 401);
  },
});
