// Peers that compute the text which is drawn, for the bars over the axis of blocks.

const peers = new Set();

/** True if the text that is drawn passes this peer. */
export const isRunning = (peerId) => peers.has(peerId);

/** Mark these peers' bars, and no others. */
export function markRunning(peerIds) {
  peers.clear();
  for (const peerId of peerIds) peers.add(peerId);
  for (const each of document.querySelectorAll("#peers details")) {
    each.parentElement.classList.toggle("running", peers.has(each.dataset.peer));
  }
}
