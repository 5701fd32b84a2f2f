// The AI SDK with @ai-sdk/openai-compatible against the server.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";
import { door, follows, nobodyServed, raised, report, SCHEMA, STORY, TEXT } from "./checks.mjs";

const of = (apiKey) =>
  createOpenAICompatible({
    name: "p2pinfer",
    baseURL: `${door.url}/v1`,
    apiKey,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
const model = of(door.key)(door.model);
const asked = { model, messages: STORY, maxOutputTokens: 13, maxRetries: 0 };

await report({
  async chat() {
    const answer = await generateText(asked);
    assert.equal(answer.text, TEXT);
    assert.equal(answer.finishReason, "length");
    assert.equal(answer.usage.outputTokens, 13);
    const text = of(door.key).completionModel(door.model);
    assert.equal((await generateText({ ...asked, messages: undefined, prompt: "Hello", model: text })).usage.outputTokens, 13);
  },
  async stream() {
    const answer = streamText(asked);
    const pieces = [];
    for await (const piece of answer.textStream) pieces.push(piece);
    assert.equal(pieces.join(""), TEXT);
    assert.ok(pieces.length > 5);
    assert.equal(await answer.finishReason, "length");
    assert.equal((await answer.usage).outputTokens, 13);
  },
  async stop() {
    const stopped = await generateText({ ...asked, maxOutputTokens: 50, stopSequences: [" named"] });
    assert.equal(stopped.text, ", there was a little girl");
    const giving = new AbortController();
    const answer = streamText({ ...asked, maxOutputTokens: 2500, abortSignal: giving.signal, onError() {} });
    for await (const _ of answer.textStream) giving.abort();
    await nobodyServed();
  },
  async tools() {
    const told = [];
    const choose = tool({
      description: "Chooses.",
      inputSchema: jsonSchema(SCHEMA),
      execute: async (input) => (told.push(input), "yes"),
    });
    const wish = { ...asked, maxOutputTokens: 250, tools: { choose }, toolChoice: "required" };
    const whole = await generateText(wish);
    assert.equal(whole.finishReason, "tool-calls");
    follows(whole.toolCalls[0].input);
    const streamed = streamText(wish);
    follows((await streamed.toolCalls)[0].input);
    follows(told[0]);
    const steps = await generateText({
      ...wish,
      toolChoice: { type: "tool", toolName: "choose" },
      stopWhen: stepCountIs(2),
    });
    assert.equal(steps.steps.length, 2);
  },
  async schema() {
    const output = Output.object({ schema: jsonSchema(SCHEMA) });
    follows((await generateText({ ...asked, maxOutputTokens: 250, output })).output);
    const streamed = streamText({ ...asked, maxOutputTokens: 250, output });
    follows(await streamed.output);
  },
  async logprobs() {
    // The SDK hands on fields that it does not know, and what was answered as it came.
    const options = { p2pinfer: { logprobs: true, top_logprobs: 2 } };
    const answer = await generateText({ ...asked, providerOptions: options, include: { responseBody: true } });
    const { content } = answer.response.body.choices[0].logprobs;
    assert.equal(content.map((entry) => entry.token).join(""), TEXT);
  },
  async several() {
    const options = { p2pinfer: { n: 2 } };
    const wish = { ...asked, temperature: 1, seed: 7, providerOptions: options, include: { responseBody: true } };
    const answer = await generateText(wish);
    const [first, second] = answer.response.body.choices.map((choice) => choice.message.content);
    assert.equal(answer.text, first);
    assert.notEqual(first, second);
  },
  async errors() {
    const unknown = await raised(generateText({ ...asked, model: of(door.key)("gpt-5") }));
    assert.ok(APICallError.isInstance(unknown));
    assert.equal(unknown.statusCode, 404);
    assert.match(unknown.message, /'gpt-5' is not served here/);
    const refused = await raised(generateText({ ...asked, presencePenalty: 1 }));
    assert.equal(refused.statusCode, 400);
    assert.match(refused.message, /presence_penalty is not supported/);
    assert.equal(refused.isRetryable, false);
    assert.equal((await raised(generateText({ ...asked, model: of("another")(door.model) }))).statusCode, 401);
    let streamed;
    for await (const part of streamText({ ...asked, presencePenalty: 1, onError() {} }).fullStream) {
      if (part.type === "error") streamed = part.error;
    }
    assert.equal(streamed.statusCode, 400);
  },
});
