// LangChain for JavaScript: @langchain/openai over chat and responses.

import assert from "node:assert/strict";

import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { ChatOpenAI, OpenAIEmbeddings } from "@langchain/openai";
import { z } from "zod";

import { decided, embedded, key, model, run, said, TEXT, url } from "./checks.mjs";

const about = { model, apiKey: key, maxRetries: 0, configuration: { baseURL: url } };
const chat = new ChatOpenAI({ ...about });
const responses = new ChatOpenAI({ ...about, useResponsesApi: true });
const Verdict = z.object({ answer: z.string(), sure: z.boolean() });
const weather = tool(async ({ city }) => `It is sunny in ${city}.`, {
  name: "weather",
  description: "Tells the weather.",
  schema: z.object({ city: z.string() }),
});

async function talks(asked) {
  const hello = new HumanMessage("Hello");
  const first = await asked.invoke([hello]);
  said(first.text);
  said((await asked.invoke([hello, first, new HumanMessage("And now?")])).text);
  let text = "";
  for await (const chunk of await asked.stream("Hello")) text += chunk.text;
  said(text);
}

async function usesATool(asked) {
  const question = new HumanMessage("How is the weather in Paris?");
  const answer = await asked.bindTools([weather], { tool_choice: "required" }).invoke([question]);
  const [call] = answer.tool_calls;
  assert.equal(call.name, "weather");
  if (TEXT !== undefined) assert.deepEqual(call.args, { city: "Paris" });
  const result = new ToolMessage({ content: "sunny", tool_call_id: call.id });
  await asked.bindTools([weather]).invoke([question, answer, result]);
}

await run({
  chat: () => talks(chat),
  "chat with a tool": () => usesATool(chat),
  "chat with a schema": async () => decided(await chat.withStructuredOutput(Verdict).invoke("Tea or rain?")),
  responses: () => talks(responses),
  "responses with a tool": () => usesATool(responses),
  "responses with a schema": async () => decided(await responses.withStructuredOutput(Verdict).invoke("Tea or rain?")),
  embeddings: async () => {
    const asked = new OpenAIEmbeddings({ ...about, model });
    embedded(await asked.embedDocuments(["tea", "rain"]), 2);
  },
});
