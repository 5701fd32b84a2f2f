// What the scripts of all clients share: a line of JSON for each feature, and what the model says.
import assert from "node:assert/strict";

const [url, key, metrics, wanted] = process.argv.slice(2);

/** Of the server: its URL, a key of its, the model's name. */
export const door = { url, key, model: "tiny-chat" };
export const STORY = [{ role: "user", content: "Once upon a time" }];
export const TEXT = ", there was a little girl named Lily. She loved to play";
export const SCHEMA = {
  type: "object",
  properties: { hero: { type: "string", enum: ["girl", "dog"] } },
  required: ["hero"],
  additionalProperties: false,
};

/** A JSON text, or an object, of SCHEMA. */
export function follows(said) {
  const value = typeof said === "string" ? JSON.parse(said) : said;
  assert.deepEqual(Object.keys(value), ["hero"]);
  assert.ok(SCHEMA.properties.hero.enum.includes(value.hero), value.hero);
}

/** The error that a promise fails with. */
export async function raised(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  assert.fail("it did not fail");
}

/** Waits until no node has a session any more. */
export async function nobodyServed() {
  const ends = performance.now() + 30_000;
  for (const port of metrics.split(",")) {
    for (;;) {
      const told = await (await fetch(`http://127.0.0.1:${port}/metrics`)).text();
      if (Number(/^p2pinfer_sessions (\S+)/m.exec(told)[1]) === 0) break;
      assert.ok(performance.now() < ends, "a session is left");
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }
}

/** Tries all features, or the one that was named, and tells what came of each. */
export async function report(features) {
  for (const [feature, check] of Object.entries(features)) {
    if (wanted && wanted !== feature) continue;
    let fault = null;
    try {
      await check();
    } catch (error) {
      fault = String(error.stack ?? error);
    }
    console.log(JSON.stringify({ feature, fault }));
  }
  process.exit(0);
}
