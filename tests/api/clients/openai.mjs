// npm's openai against the server.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { door, follows, nobodyServed, raised, report, SCHEMA, STORY, TEXT } from "./checks.mjs";

const client = new OpenAI({ baseURL: `${door.url}/v1`, apiKey: door.key, maxRetries: 0 });
const asked = { model: door.model, messages: STORY, max_tokens: 13 };
const tool = { type: "function", function: { name: "choose", description: "Chooses.", parameters: SCHEMA } };

await report({
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.deepEqual(ids, [door.model]);
    assert.equal((await client.models.retrieve(door.model)).object, "model");
  },
  async chat() {
    const chat = await client.chat.completions.create(asked);
    assert.equal(chat.choices[0].message.content, TEXT);
    assert.equal(chat.choices[0].finish_reason, "length");
    assert.equal(chat.usage.completion_tokens, 13);
    const text = await client.completions.create({ model: door.model, prompt: "Once upon a time", max_tokens: 13 });
    assert.equal(text.choices[0].text, TEXT);
    const response = await client.responses.create({
      model: door.model,
      input: "Once upon a time",
      max_output_tokens: 13,
    });
    assert.equal(response.output_text, TEXT);
  },
  async stream() {
    const stream = client.chat.completions.stream({ ...asked, stream_options: { include_usage: true } });
    const pieces = [];
    stream.on("content", (piece) => pieces.push(piece));
    const whole = await stream.finalChatCompletion();
    assert.equal(pieces.join(""), TEXT);
    assert.ok(pieces.length > 5);
    assert.equal(whole.choices[0].message.content, TEXT);
    assert.equal(whole.usage.completion_tokens, 13);
    let said = "";
    const response = await client.responses.create({
      model: door.model,
      input: "Once upon a time",
      max_output_tokens: 13,
      stream: true,
    });
    for await (const event of response) said += event.type === "response.output_text.delta" ? event.delta : "";
    assert.equal(said, TEXT);
  },
  async stop() {
    const stopped = await client.chat.completions.create({ ...asked, max_tokens: 50, stop: [" named"] });
    assert.equal(stopped.choices[0].message.content, ", there was a little girl");
    assert.equal(stopped.choices[0].finish_reason, "stop");
    for await (const _ of await client.chat.completions.create({ ...asked, max_tokens: 2500, stream: true })) break;
    const stream = client.chat.completions.stream({ ...asked, max_tokens: 2500 });
    stream.once("content", () => stream.abort());
    assert.ok((await raised(stream.done())) instanceof OpenAI.APIUserAbortError);
    await nobodyServed();
  },
  async tools() {
    const wish = { ...asked, max_tokens: 250, tools: [tool], tool_choice: "required" };
    const { message, finish_reason } = (await client.chat.completions.create(wish)).choices[0];
    assert.equal(finish_reason, "tool_calls");
    assert.equal(message.tool_calls[0].function.name, "choose");
    follows(message.tool_calls[0].function.arguments);
    const streamed = (await client.chat.completions.stream(wish).finalChatCompletion()).choices[0];
    assert.equal(streamed.message.tool_calls[0].function.arguments, message.tool_calls[0].function.arguments);
    const answer = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "yes" };
    const next = await client.chat.completions.create({ ...asked, messages: [...STORY, message, answer] });
    assert.equal(next.usage.completion_tokens, 13);
    let told = "";
    const runner = client.chat.completions.runTools({
      ...asked,
      max_tokens: 250,
      tools: [{ type: "function", function: { ...tool.function, parse: JSON.parse, function: (x) => (told = x) } }],
      tool_choice: { type: "function", function: { name: "choose" } },
    });
    await runner.done();
    follows(told);
  },
  async schema() {
    const form = { type: "json_schema", json_schema: { name: "hero", schema: SCHEMA, strict: true } };
    const parsed = await client.chat.completions.parse({ ...asked, max_tokens: 250, response_format: form });
    follows(parsed.choices[0].message.content);
    const form2 = { format: { type: "json_schema", name: "hero", schema: SCHEMA, strict: true } };
    const wish = { model: door.model, input: "Once upon a time", max_output_tokens: 250, text: form2 };
    follows((await client.responses.create(wish)).output_text);
  },
  async logprobs() {
    const wish = { ...asked, logprobs: true, top_logprobs: 2 };
    const { content } = (await client.chat.completions.create(wish)).choices[0].logprobs;
    assert.equal(content.map((entry) => entry.token).join(""), TEXT);
    assert.ok(content.every((entry) => entry.logprob <= 0 && entry.top_logprobs.length === 2));
    const streamed = await client.chat.completions.stream(wish).finalChatCompletion();
    assert.deepEqual(streamed.choices[0].logprobs.content, content);
  },
  async several() {
    const wish = { ...asked, n: 2, temperature: 1, seed: 7 };
    const whole = await client.chat.completions.create(wish);
    const texts = whole.choices.map((choice) => choice.message.content);
    assert.notEqual(texts[0], texts[1]);
    const streamed = await client.chat.completions.stream(wish).finalChatCompletion();
    assert.deepEqual(streamed.choices.map((choice) => choice.message.content), texts);
  },
  async errors() {
    const create = (wish) => raised(client.chat.completions.create({ ...asked, ...wish }));
    const unknown = await create({ model: "gpt-5" });
    assert.ok(unknown instanceof OpenAI.NotFoundError);
    assert.equal(unknown.code, "model_not_found");
    const refused = await create({ presence_penalty: 1 });
    assert.ok(refused instanceof OpenAI.BadRequestError);
    assert.equal(refused.param, "presence_penalty");
    const long = await create({ messages: [{ role: "user", content: "word ".repeat(2000) }] });
    assert.ok(long instanceof OpenAI.BadRequestError);
    assert.equal(long.code, "context_length_exceeded");
    assert.ok((await create({ n: 99 })) instanceof OpenAI.BadRequestError);
    const embedding = await raised(client.embeddings.create({ model: door.model, input: "text" }));
    assert.ok(embedding instanceof OpenAI.BadRequestError);
    assert.match(embedding.message, /has no embeddings/);
    const stranger = new OpenAI({ baseURL: `${door.url}/v1`, apiKey: "another", maxRetries: 0 });
    assert.ok((await raised(stranger.models.list())) instanceof OpenAI.AuthenticationError);
  },
});
