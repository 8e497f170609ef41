// What the checks of the JavaScript clients share; see checks.py.

import assert from "node:assert/strict";

export const url = process.env.OPENAI_BASE_URL;
export const key = process.env.OPENAI_API_KEY;
export const model = process.env.CLIENTS_MODEL;
export const TEXT = process.env.CLIENTS_TEXT;

export function said(text) {
  assert.ok(typeof text === "string" && text);
  if (TEXT !== undefined) assert.equal(text, TEXT);
}

export function decided(verdict) {
  assert.deepEqual(Object.keys(verdict).sort(), ["answer", "sure"]);
  if (TEXT !== undefined) assert.deepEqual(verdict, { answer: "tea", sure: true });
}

export function embedded(vectors, count) {
  assert.equal(vectors.length, count);
  for (const vector of vectors) assert.ok(Math.abs(vector.reduce((sum, x) => sum + x * x, 0) - 1) < 1e-3);
}

// Run the checks, in order or those that are named, and print a line of JSON for each.
export async function run(checks) {
  const wanted = process.argv.slice(2);
  for (const [check, ask] of Object.entries(checks)) {
    if (wanted.length && !wanted.includes(check)) continue;
    let error = null;
    try {
      await ask();
    } catch (found) {
      console.error(found);
      error = `${found.name}: ${found.message}`.slice(0, 500);
    }
    console.log(JSON.stringify({ check, error }));
  }
}
