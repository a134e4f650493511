/** Compare two models: texts from the same prompt, settings and seed, or the probabilities of the same text. */
import { byId } from "./dom.js";
import { streamInto } from "./generate.js";
import * as settings from "./settings.js";
import { report, reporting } from "./status.js";
import { TextView } from "./text-view.js";

/** @param {() => string} currentText the text that both models score */
export function startComparison(currentText) {
  let running = new AbortController();
  const sides = ["a", "b"].map((side) => ({
    select: byId(`model-${side}`),
    summary: byId(`summary-${side}`),
    view: new TextView(byId(`frame-${side}`), `Text of model ${side.toUpperCase()}`, goOn),
  }));

  function goOn(prompt) {
    const input = settings.field("prompt");
    input.value = prompt;
    input.dispatchEvent(new Event("input", { bubbles: true }));
    return generate();
  }

  const generate = () => run({ prompt: settings.field("prompt").value });
  const scoreText = () => run({ prompt: currentText(), max_tokens: 0 });

  async function run(changes) {
    running.abort();
    running = new AbortController();
    const { signal } = running;
    byId("stop-both").disabled = false;
    report("compare", "Both models are running…", "busy");
    await reporting("compare", async () => {
      const finished = await Promise.all(sides.map((side) => runSide(side, changes, signal)));
      const scored = changes.max_tokens === 0;
      report(
        "compare",
        scored
          ? "Both models scored the same text."
          : `${sides[0].select.value}: ${finished[0]} ${sides[1].select.value}: ${finished[1]}`,
      );
    });
    if (running.signal === signal) byId("stop-both").disabled = true;
  }

  byId("generate-both").addEventListener("click", generate);
  byId("score-both").addEventListener("click", scoreText);
  byId("stop-both").addEventListener("click", () => {
    running.abort();
    report("compare", "Stopped both models.");
    byId("stop-both").disabled = true;
  });
}

async function runSide({ select, summary, view }, changes, signal) {
  summary.textContent = "";
  const sentence = await streamInto(view, { ...settings.completion(), ...changes, model: select.value }, signal);
  summary.textContent = meanSurprise(view, changes.max_tokens === 0);
  return sentence;
}

/** The mean surprise of the generated text, or of all of it, in bits. */
function meanSurprise(view, all) {
  const tokens = view.tokens.slice(all ? 0 : view.tokens.length - view.generated);
  const bits = tokens
    .filter(({ probability }) => probability !== null)
    .map(({ probability }) => -Math.log2(probability));
  if (!bits.length) return "";
  const mean = bits.reduce((sum, each) => sum + each, 0) / bits.length;
  return `${mean.toFixed(2)} bits per token over ${bits.length} ${all ? "" : "generated "}tokens`;
}
