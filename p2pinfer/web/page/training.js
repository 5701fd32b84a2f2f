// Trainings of this computer, each with the curve of its loss: a picture for eyes, and a sentence for everybody.

import { byId, element } from "./elements.js";
import { ask } from "./server.js";

const EVERY_MS = 2000;
const WIDTH = 600;
const HEIGHT = 150;
const LEFT = 46; // of the axis, where its figures stand
const SVG = "http://www.w3.org/2000/svg";

/** Look for trainings again and again. */
export async function watchTrainings() {
  for (;;) {
    try {
      draw((await (await ask("/p2pinfer/trainings")).json()).trainings);
    } catch {
      // The swarm's part of the page says that the server does not answer.
    }
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

function draw(trainings) {
  byId("training").hidden = trainings.length === 0;
  byId("trainings").replaceChildren(...trainings.map(drawTraining));
}

function drawTraining(training) {
  const told = sentence(training);
  const item = element("li", training.state, element("b", "", training.name), element("p", "facts", told));
  if (training.losses.length > 1) item.append(curve(training.losses, `Loss of ${training.name}: ${told}`));
  return item;
}

function sentence({ state, step, steps, loss, tokens_per_s, left_s, model }) {
  const at = loss === null ? "no step yet" : `loss ${loss.toFixed(3)} after step ${step} of ${steps}`;
  const rest = state === "running" && step ? `, ${Math.round(tokens_per_s)} tokens/s, ${duration(left_s)} left` : "";
  return `${model}, ${{ running: "running", done: "done", interrupted: "interrupted" }[state]}: ${at}${rest}`;
}

const duration = (seconds) => (seconds < 100 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`);

/** A line of `[step, loss]`, with the least and the greatest loss and the last step at its edges. */
function curve(losses, label) {
  const values = losses.map(([, loss]) => loss);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const [first, last] = [losses[0][0], losses.at(-1)[0]];
  const x = (step) => LEFT + ((step - first) / (last - first || 1)) * (WIDTH - LEFT - 6);
  const y = (loss) => 8 + ((high - loss) / (high - low || 1)) * (HEIGHT - 32);
  const picture = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label, class: "curve" });
  for (const loss of [high, low]) {
    picture.append(shape("path", { class: "grid", d: `M${LEFT} ${y(loss)}H${WIDTH - 6}` }));
    picture.append(text(loss.toFixed(2), { x: LEFT - 6, y: y(loss) + 4, "text-anchor": "end" }));
  }
  picture.append(text(`step ${Math.round(last)}`, { x: WIDTH - 6, y: HEIGHT - 4, "text-anchor": "end" }));
  const points = losses.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`).join(" ");
  picture.append(shape("polyline", { class: "line", points }));
  return picture;
}

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function text(said, attributes) {
  const made = shape("text", attributes);
  made.textContent = said;
  return made;
}
