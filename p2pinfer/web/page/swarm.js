// Who holds which blocks, how they are reached, and what they are trusted: bars over the axis of blocks.

import { byId, element, shortId, span } from "./elements.js";
import { isRunning } from "./running.js";
import { ask } from "./server.js";

const EVERY_MS = 3000;
const REACHED = {
  public: "Others can dial it",
  mapped: "Others can dial it, by a port of its router",
  private: "It is behind a router: reached by a punched hole or through a relay",
  unknown: "Nobody has said yet if others can dial it",
};

let lookNow = () => {}; // ends the pause between two looks

/** Look at the swarm of the chosen model again and again. */
export async function watchSwarm() {
  const choice = byId("models");
  choice.addEventListener("change", () => lookNow());
  for (;;) {
    const chosen = choice.value;
    try {
      draw(await (await ask(chosen ? `/p2pinfer/swarm?model=${encodeURIComponent(chosen)}` : "/p2pinfer/swarm")).json());
    } catch {
      byId("coverage").textContent = "The server does not answer.";
      byId("coverage").className = "holes";
      choice.replaceChildren(); // it may come back with other models
    }
    if (chosen && choice.value && choice.value !== chosen) continue; // chosen meanwhile
    await new Promise((resolve) => {
      lookNow = resolve;
      setTimeout(resolve, EVERY_MS);
    });
  }
}

/** Let people choose, where there is more than one model. */
function offer(models) {
  const choice = byId("models");
  const offered = [...choice.options].map((each) => each.value);
  if (JSON.stringify(offered) !== JSON.stringify(models)) {
    choice.replaceChildren(...models.map((each) => element("option", "", each)));
  }
  byId("choice").hidden = models.length < 2;
}

function draw({ models, swarm, trust, bans }) {
  offer(models);
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
  const inOrder = [...swarm.peers].sort((one, other) => one.blocks[0] - other.blocks[0] || one.blocks[1] - other.blocks[1]);
  byId("peers").replaceChildren(...inOrder.map((peer) => drawPeer(peer, trust[peer.peer_id], swarm, open)));
  drawBans(bans);
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
    peer.name && `“${peer.name}”`,
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
      `Integrity ${trusted.integrity.toFixed(2)} and reliability ${trusted.reliability.toFixed(2)}, of 1: ` +
        `${trusted.standing}. ${REACHED[peer.reachability] ?? REACHED.unknown}. ` +
        `Computes in ${peer.dtype}, has room for ${peer.free_cache_tokens.toLocaleString()} tokens.`,
    ),
    ...trusted.why.map((each) => element("p", "", each)),
  );
  details.dataset.peer = peer.peer_id;
  details.open = open.has(peer.peer_id);
  return element("li", isRunning(peer.peer_id) ? "running" : "", details, bar);
}

/** Peers that are never used, and on what evidence; also those that serve nothing any more. */
function drawBans(bans) {
  byId("banned").hidden = bans.length === 0;
  const told = JSON.stringify(bans);
  if (byId("bans").dataset.told === told) return; // or a reader's place in it is lost every time
  byId("bans").dataset.told = told;
  byId("bans").replaceChildren(...bans.map(drawBan));
}

function drawBan(ban) {
  const by = { user: "banned by you", audits: "banned by audits", proof: "banned by a proof" }[ban.by];
  const when = ban.at > 0 ? `, ${new Date(ban.at * 1000).toLocaleString()}` : "";
  const proofs = ban.proofs.map((proof) => {
    const from = proof.sender ? `sent by ${shortId(proof.sender)}` : "made on this computer";
    const found = { verified: "it was run again here and holds", false: "it was run again here and does not hold" };
    return element("p", "proof", `Proof ${proof.address}, ${from}: ${found[proof.state] ?? "not run again here"}.`);
  });
  return element("li", "", element("b", "", shortId(ban.peer_id)), ` ${by}${when}: ${ban.why}`, ...proofs);
}
