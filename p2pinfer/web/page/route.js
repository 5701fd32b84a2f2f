// A running text along its route, as the client's events tell it.

import { byId, element, shortId, span } from "./elements.js";
import { markRunning } from "./running.js";
import { ask, events } from "./server.js";

const LATER_MS = 2000; // until the events are asked for again after they broke off
const MOST = 50; // happenings that stay

let shown = null; // the session that is drawn: the latest one that began

/** Follow the events for as long as the page is open. */
export async function followRoute() {
  for (;;) {
    try {
      for await (const event of events(await ask("/p2pinfer/events"))) take(event);
    } catch {
      // It is asked again: the server may have been started anew.
    }
    shown = null;
    markRunning([]);
    await new Promise((resolve) => setTimeout(resolve, LATER_MS));
  }
}

function take(event) {
  switch (event.event) {
    case "session_started":
      shown = event.session;
      draw(event.route);
      break;
    case "step_done":
      if (event.session === shown) time(event);
      break;
    case "hop_failed":
      byId("route").querySelector(`[data-peer="${CSS.escape(event.peer_id)}"]`)?.classList.add("failed");
      happened(`${shortId(event.peer_id)} failed: ${event.reason}`, "bad");
      break;
    case "hop_replaced": {
      if (event.session === shown) draw(event.route);
      const why = event.cause === "failure" ? "was replaced, and the text goes on" : "handed over";
      happened(`${event.replaced.map(shortId).join(", ")} ${why}`);
      break;
    }
    case "relay_left":
      happened(`${shortId(event.peer_id)} is connected directly now`);
      break;
    case "audit_done":
      happened(
        `${shortId(event.peer_id)} was audited: ${event.verdict}${event.reason ? `, ${event.reason}` : ""}`,
        event.verdict === "fail" ? "bad" : "",
      );
      break;
    case "session_ended":
      if (event.session === shown) {
        shown = null;
        markRunning([]);
      }
      break;
  }
}

function draw(route) {
  const parts = [element("li", "hop here", element("b", "", "You"), element("span", "", "embedding, head"))];
  for (const hop of route) {
    const box = element(
      "li",
      `hop ${hop.connection}`,
      element("b", "", shortId(hop.peer_id)),
      element("span", "", `${span(hop.blocks)}, ${hop.connection}`),
      element("span", "ms", ""),
    );
    box.dataset.peer = hop.peer_id;
    const arrow = element("li", "arrow", "→");
    arrow.setAttribute("aria-hidden", "true");
    parts.push(arrow, box);
  }
  byId("route").replaceChildren(...parts);
  markRunning(route.map((hop) => hop.peer_id));
}

function time(step) {
  const boxes = byId("route").querySelectorAll(".ms");
  boxes.forEach((box, index) => {
    const ms = step.per_hop_ms[index];
    if (ms !== undefined) box.textContent = `${ms.toFixed(1)} ms`;
  });
  const you = byId("route").querySelector(".here span");
  if (you) you.textContent = `${step.ms.toFixed(0)} ms a trip`;
}

function happened(text, className = "") {
  const list = byId("happenings");
  list.querySelector(".quiet")?.remove();
  list.prepend(element("li", className, `${new Date().toLocaleTimeString()} ${text}`));
  while (list.children.length > MOST) list.lastChild.remove();
}
