/** Streams a prompt and its continuation into a text view. */
import { complete } from "./api.js";

/**
 * @param {import("./text-view.js").TextView} view
 * @param {{prompt: string, seed: number}} body
 * @param {AbortSignal} signal
 * @param {import("./api.js").Token[]} [known] see `TextView.clear`
 * @returns {Promise<string>} a sentence about the finished text, with the warnings of the server
 */
export async function streamInto(view, body, signal, known) {
  const started = performance.now();
  const warnings = new Set();
  view.clear(body.prompt.length, known);
  view.element.classList.add("streaming");
  view.signal = signal;
  try {
    for await (const chunk of complete(body, signal)) {
      if (signal.aborted) break;
      view.append(chunk.tokens);
      chunk.warnings.forEach((warning) => warnings.add(warning));
    }
  } finally {
    // A restarted view streams already the next text.
    if (view.signal === signal) view.element.classList.remove("streaming");
  }
  const seconds = (performance.now() - started) / 1000;
  return [...warnings, `${view.generated} tokens in ${seconds.toFixed(1)} s, seed ${body.seed}.`].join(" ");
}
