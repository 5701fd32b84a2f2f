// What the page asks of its server: JSON, and streams of server-sent events.

let key = sessionStorage.getItem("p2pinfer-key") ?? "";
let askForKey = async () => "";

/** Say how a key is asked for where the server wants one. */
export function onKeyWanted(ask) {
  askForKey = ask;
}

/** Fetch `path`; asks for a key, once and again, where the server wants one. Throws Error with its words. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    key = await askForKey();
    sessionStorage.setItem("p2pinfer-key", key);
    return ask(path, options);
  }
  if (!response.ok) throw new Error(await reason(response));
  return response;
}

/** Objects of a stream of server-sent events, until it ends. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      unread += value;
      const parts = unread.split("\n\n");
      unread = parts.pop();
      for (const part of parts) {
        const line = part.split("\n").find((each) => each.startsWith("data: "));
        if (line && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function reason(response) {
  try {
    const { error } = await response.json();
    return error.message ?? String(error);
  } catch {
    return `the server answered ${response.status}`;
  }
}
