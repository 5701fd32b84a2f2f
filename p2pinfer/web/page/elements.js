// Small helpers for the document. Texts are always set as text: what peers and models say is never HTML.

/** The element of that id. */
export const byId = (id) => document.getElementById(id);

/** An element with a class, and children that are elements or texts. */
export function element(name, className = "", ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/** The end of a peer id, by which people tell peers apart. */
export const shortId = (peerId) => `…${peerId.slice(-6)}`;

/** A span of blocks as people write it. */
export const span = ([start, stop]) => `blocks ${start}–${stop - 1}`;
