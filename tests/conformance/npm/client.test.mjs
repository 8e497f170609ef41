// The npm client against the server: streaming, tools, parse, errors. Run by `node --test`, see ../javascript.py.

import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI, { toFile } from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ maxRetries: 0 }); // OPENAI_BASE_URL and OPENAI_API_KEY
const model = "pocket";
const messages = [{ role: "user", content: "Hello" }];
const Verdict = z.object({ answer: z.string(), sure: z.boolean() });
const City = z.object({ city: z.string() });
const TEXT = "Hello, world! 你好";

test("a chat comes whole", async () => {
  const found = await client.chat.completions.create({ model, messages });
  assert.equal(found.choices[0].message.content, TEXT);
  assert.equal(found.usage.total_tokens, found.usage.prompt_tokens + found.usage.completion_tokens);
});

test("a chat streams, with its usage at the end", async () => {
  const stream = await client.chat.completions.create({
    model,
    messages,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, TEXT);
  assert.ok(usage.completion_tokens > 0);
});

test("the client's own stream puts the same together", async () => {
  const stream = client.chat.completions.stream({ model, messages });
  assert.equal((await stream.finalMessage()).content, TEXT);
});

test("a stream that is left ends", async () => {
  const stream = await client.chat.completions.create({ model, messages, stream: true });
  for await (const _ of stream) break;
  assert.ok(stream.controller.signal.aborted);
});

test("a schema is parsed into a value", async () => {
  const found = await client.chat.completions.parse({
    model,
    messages,
    response_format: zodResponseFormat(Verdict, "verdict"),
  });
  assert.deepEqual(found.choices[0].message.parsed, { answer: "tea", sure: true });
});

test("a tool's arguments are parsed", async () => {
  const tools = [zodFunction({ name: "weather", parameters: City })];
  const found = await client.chat.completions.parse({ model, messages, tools, tool_choice: "required" });
  const [call] = found.choices[0].message.tool_calls;
  assert.equal(call.function.name, "weather");
  assert.deepEqual(call.function.parsed_arguments, { city: "Paris" });
  assert.equal(found.choices[0].finish_reason, "tool_calls");
});

test("a tool's call streams", async () => {
  const tools = [zodFunction({ name: "weather", parameters: City })];
  const stream = client.chat.completions.stream({ model, messages, tools, tool_choice: "required" });
  const message = await stream.finalMessage();
  assert.deepEqual(JSON.parse(message.tool_calls[0].function.arguments), { city: "Paris" });
});

test("a response comes whole, streamed and parsed", async () => {
  assert.equal((await client.responses.create({ model, input: "Hello" })).output_text, TEXT);
  let text = "";
  const kinds = [];
  for await (const event of await client.responses.create({ model, input: "Hello", stream: true })) {
    kinds.push(event.type);
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  assert.equal(text, TEXT);
  assert.deepEqual([kinds[0], kinds.at(-1)], ["response.created", "response.completed"]);
  const parsed = await client.responses.parse({
    model,
    input: "Hello",
    text: { format: zodTextFormat(Verdict, "verdict") },
  });
  assert.deepEqual(parsed.output_parsed, { answer: "tea", sure: true });
});

test("a conversation is gone on with", async () => {
  const conversation = await client.conversations.create({ metadata: { about: "tea" } });
  await client.responses.create({ model, input: "Hello", conversation: conversation.id });
  const items = await client.conversations.items.list(conversation.id, { order: "asc" });
  assert.deepEqual(items.data.map((item) => item.role), ["user", "assistant"]);
});

test("files go up and come back", async () => {
  const file = await client.files.create({
    file: await toFile(Buffer.from('{"a": 1}\n'), "a.jsonl"),
    purpose: "batch",
  });
  assert.equal(await (await client.files.content(file.id)).text(), '{"a": 1}\n');
  assert.ok((await client.files.delete(file.id)).deleted);
});

test("embeddings are vectors of numbers", async () => {
  const found = await client.embeddings.create({ model, input: ["a", "b"] });
  assert.equal(found.data.length, 2);
  assert.ok(found.data[0].embedding.every((value) => typeof value === "number"));
});

test("errors are the client's exceptions", async () => {
  await assert.rejects(client.models.retrieve("nope"), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ model, messages, temperature: 9 }), OpenAI.BadRequestError);
  const stranger = new OpenAI({ apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
});
