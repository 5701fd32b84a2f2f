// Who holds which blocks, how they are reached, and what they are trusted: bars over the axis of blocks.

import { byId, element, shortId, span } from "./elements.js";
import { ask } from "./server.js";

const EVERY_MS = 3000;

/** Look at the swarm again and again. */
export async function watchSwarm() {
  for (;;) {
    try {
      draw(await (await ask("/p2pinfer/swarm")).json());
    } catch {
      byId("coverage").textContent = "The server does not answer.";
      byId("coverage").className = "holes";
    }
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

function draw({ swarm, trust }) {
  document.body.dataset.model = swarm.model;
  byId("model").textContent = `${swarm.model}, ${swarm.num_blocks} blocks`;
  const coverage = byId("coverage");
  const told = swarm.missing.length
    ? `Nobody serves ${swarm.missing.map(span).join(" and ")}.`
    : `${swarm.peers.length} ${swarm.peers.length === 1 ? "peer serves" : "peers serve"} all ${swarm.num_blocks} blocks.`;
  if (coverage.textContent !== told) coverage.textContent = told; // or it is read aloud every time
  coverage.className = swarm.missing.length ? "holes" : "";
  drawAxis(swarm);
  const open = new Set([...byId("peers").querySelectorAll("details[open]")].map((each) => each.dataset.peer));
  const focused = document.activeElement?.closest("details")?.dataset.peer;
  byId("peers").replaceChildren(...swarm.peers.map((peer) => drawPeer(peer, trust[peer.peer_id], swarm, open)));
  if (focused) byId("peers").querySelector(`[data-peer="${CSS.escape(focused)}"] summary`)?.focus();
}

function drawAxis(swarm) {
  const cells = [];
  const step = Math.max(1, Math.ceil(swarm.num_blocks / 8));
  for (let block = 0; block < swarm.num_blocks; block += step) {
    const cell = element("i", "", String(block));
    cell.style.gridColumn = `${block + 1} / span ${Math.min(step, swarm.num_blocks - block)}`;
    cells.push(cell);
  }
  const holes = swarm.missing.map((each) => bit(each, "hole"));
  const axis = byId("axis");
  axis.style.gridTemplateColumns = `repeat(${swarm.num_blocks}, 1fr)`;
  axis.replaceChildren(...cells, ...holes);
}

function bit([start, stop], className) {
  const made = element("i", className);
  made.style.gridColumn = `${start + 1} / ${stop + 1}`;
  return made;
}

function drawPeer(peer, trusted, swarm, open) {
  const connection = peer.connection ?? "not connected";
  const state = trusted.banned ? "banned" : { direct: "direct", relayed: "relayed" }[peer.connection] ?? "apart";
  const bar = element("div", "bar", bit(peer.blocks, state));
  bar.style.gridTemplateColumns = `repeat(${swarm.num_blocks}, 1fr)`;
  bar.setAttribute("aria-hidden", "true");
  const facts = [
    span(peer.blocks),
    trusted.banned ? "banned" : connection,
    peer.rtt_ms === null ? "" : `${peer.rtt_ms.toFixed(0)} ms`,
    `${peer.tokens_per_s.toFixed(0)} tokens/s`,
  ].filter(Boolean);
  const details = element(
    "details",
    "",
    element("summary", "", `${shortId(peer.peer_id)} `, element("span", "facts", facts.join(", "))),
    element("p", "", peer.peer_id),
    element(
      "p",
      "",
      `Integrity ${trusted.integrity.toFixed(2)} and reliability ${trusted.reliability.toFixed(2)}, of 1. ` +
        `Computes in ${peer.dtype}, has room for ${peer.free_cache_tokens.toLocaleString()} tokens.`,
    ),
    ...trusted.why.map((each) => element("p", "", each)),
  );
  details.dataset.peer = peer.peer_id;
  details.open = open.has(peer.peer_id);
  return element("li", "", details, bar);
}
