// Start of the page.

import { startChat } from "./chat.js";
import { byId } from "./elements.js";
import { followRoute } from "./route.js";
import { onKeyWanted } from "./server.js";
import { watchSwarm } from "./swarm.js";
import { watchTrainings } from "./training.js";

let wanted = null;
onKeyWanted(() => {
  wanted ??= new Promise((resolve) => {
    byId("key-dialog").addEventListener(
      "close",
      () => {
        wanted = null;
        resolve(byId("key").value.trim());
      },
      { once: true },
    );
    byId("key-dialog").showModal();
  });
  return wanted;
});
startChat();
watchSwarm();
watchTrainings();
followRoute();
byId("prompt").focus();
