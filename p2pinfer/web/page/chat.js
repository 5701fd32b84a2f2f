// The conversation: asked of the API as by any other client, shown as it comes.

import { byId, element, shortId, span } from "./elements.js";
import { ask, events } from "./server.js";

const said = []; // messages of this conversation
let running = null; // AbortController of the answer that is coming

/** Connect the form, the buttons and the keys. */
export function startChat() {
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) answer(byId("prompt").value);
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("ask").requestSubmit();
    }
  });
  byId("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  byId("clear").addEventListener("click", () => {
    running?.abort();
    said.length = 0;
    byId("log").replaceChildren();
    byId("hint").hidden = false;
    byId("prompt").focus();
  });
}

async function answer(prompt) {
  const model = document.body.dataset.model;
  said.push({ role: "user", content: prompt });
  const conversation = [...said];
  show("You", "you").textContent = prompt;
  const text = show(model ?? "model", "model");
  byId("prompt").value = "";
  byId("hint").hidden = true;
  byId("notice").textContent = "";
  running = new AbortController();
  setRunning(true);
  let whole = "";
  try {
    const response = await ask("/v1/chat/completions", {
      method: "POST",
      signal: running.signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        model,
        messages: conversation,
        stream: true,
        temperature: Number(byId("temperature").value),
        max_tokens: Number(byId("tokens").value),
      }),
    });
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      whole += chunk.choices[0]?.delta?.content ?? "";
      text.textContent = whole;
      if (chunk.p2pinfer) text.after(origin(chunk.p2pinfer));
      follow();
    }
  } catch (error) {
    if (error.name === "AbortError") text.after(element("p", "origin", "Stopped."));
    else byId("notice").textContent = `The answer broke off: ${error.message}`;
  }
  if (whole) said.push({ role: "assistant", content: whole });
  else if (said.at(-1) === conversation.at(-1)) said.pop();
  running = null;
  setRunning(false);
}

function show(who, className) {
  const text = element("div", "said");
  byId("log").append(element("div", `turn ${className}`, element("span", "who", who), text));
  follow(true);
  return text;
}

/** Keep the newest words in sight, unless the reader has scrolled up. */
function follow(always = false) {
  const log = byId("log");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

function origin(report) {
  const hops = report.route.map((hop, index) => {
    const ms = report.per_hop_ms[index];
    return `${shortId(hop.peer_id)} (${span(hop.blocks)}${ms === undefined ? "" : `, ${ms.toFixed(1)} ms`})`;
  });
  const failed = report.failovers ? `, ${report.failovers} failed and replaced` : "";
  const rate = `${report.tokens_per_s} tokens/s`;
  return element("p", "origin", `${rate}, ${hops.length} hops${failed}: ${hops.join(" → ")}`);
}

function setRunning(isRunning) {
  byId("stop").hidden = !isRunning;
  byId("send").disabled = isRunning;
}
