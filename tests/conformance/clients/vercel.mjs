// Vercel's AI SDK: its provider for OpenAI (responses, chat, completions) and the one for what is like OpenAI.

import assert from "node:assert/strict";

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

import { decided, embedded, key, model, run, said, TEXT, url } from "./checks.mjs";

const openai = createOpenAI({ baseURL: url, apiKey: key });
const compatible = createOpenAICompatible({
  name: "fledge",
  baseURL: url,
  apiKey: key,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const maxRetries = 0;
const Verdict = z.object({ answer: z.string(), sure: z.boolean() });
const weather = tool({
  description: "Tells the weather.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `It is sunny in ${city}.`,
});

async function talks(asked) {
  const hello = { role: "user", content: "Hello" };
  const first = await generateText({ model: asked, maxRetries, system: "Be kind.", messages: [hello] });
  said(first.text);
  assert.ok(first.usage.totalTokens > 0);
  const messages = [hello, ...first.response.messages, { role: "user", content: "And now?" }];
  said((await generateText({ model: asked, maxRetries, messages })).text);
}

async function streams(asked) {
  const result = streamText({ model: asked, maxRetries, prompt: "Hello", onError: () => {} });
  let text = "";
  for await (const piece of result.fullStream) {
    if (piece.type === "error") throw piece.error;
    if (piece.type === "text-delta") text += piece.text;
  }
  said(text);
  assert.ok((await result.usage).outputTokens > 0);
}

async function usesATool(asked) {
  const about = { model: asked, maxRetries, tools: { weather }, prompt: "How is the weather in Paris?" };
  const whole = await generateText({ ...about, stopWhen: stepCountIs(3) });
  if (TEXT !== undefined) assert.deepEqual(whole.steps[0].toolCalls[0].input, { city: "Paris" });
  said(whole.text);
  const result = streamText({ ...about, toolChoice: "required", onError: () => {} });
  const calls = [];
  for await (const piece of result.fullStream) {
    if (piece.type === "error") throw piece.error;
    if (piece.type === "tool-call") calls.push(piece.toolName);
  }
  assert.ok(calls.length > 0 && calls.every((name) => name === "weather"));
}

async function decides(asked) {
  const output = Output.object({ schema: Verdict });
  decided((await generateText({ model: asked, maxRetries, prompt: "Tea or rain?", output })).output);
  const both = { model: asked, maxRetries, prompt: "Tea or rain?", output, tools: { weather }, stopWhen: stepCountIs(3) };
  decided((await generateText(both)).output);
}

async function embeds(asked) {
  embedded((await embedMany({ model: asked, maxRetries, values: ["tea", "rain"] })).embeddings, 2);
}

await run({
  responses: () => talks(openai(model)),
  "responses streamed": () => streams(openai(model)),
  "responses with a tool": () => usesATool(openai(model)),
  "responses with a schema, and with a tool beside it": () => decides(openai(model)),
  chat: () => talks(openai.chat(model)),
  "chat streamed": () => streams(openai.chat(model)),
  "chat with a tool": () => usesATool(openai.chat(model)),
  "chat with a schema, and with a tool beside it": () => decides(openai.chat(model)),
  completions: async () => {
    const asked = openai.completion(model);
    assert.ok((await generateText({ model: asked, maxRetries, prompt: "Once upon a time" })).text);
  },
  embeddings: () => embeds(openai.embedding(model)),
  "the compatible provider": () => talks(compatible(model)),
  "the compatible provider streamed": () => streams(compatible(model)),
  "the compatible provider with a tool": () => usesATool(compatible(model)),
  "the compatible provider with a schema, and with a tool beside it": () => decides(compatible(model)),
  "the compatible provider's embeddings": () => embeds(compatible.embeddingModel(model)),
});
