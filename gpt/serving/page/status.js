/** The status line at the bottom of the page: one message at a time, read aloud by screen readers. */
import { isAbort } from "./api.js";
import { byId } from "./dom.js";

let shownBy = "";

/**
 * @param {string} source only the same source clears the message
 * @param {string} message
 * @param {"" | "info" | "error" | "busy"} [level]
 */
export function report(source, message, level = "info") {
  const line = byId("status");
  shownBy = source;
  line.textContent = message;
  line.dataset.level = level;
}

/** @param {string} source clear the error of this source, if it is the one that is shown */
export function clearError(source) {
  if (shownBy === source && byId("status").dataset.level === "error") report("", "");
}

/**
 * Run an action; an error becomes a message, a cancelled request none.
 * @param {string} source @param {() => Promise<void>} action
 */
export async function reporting(source, action) {
  try {
    await action();
  } catch (error) {
    if (isAbort(error)) return;
    report(source, error instanceof Error ? error.message : String(error), "error");
  }
}

/**
 * Make an action that runs once at a time: calls during a run lead to one more run, after it. So a picture follows a
 * moving slider as fast as the server answers.
 * @param {string} source @param {() => Promise<void>} action
 * @returns {() => Promise<void>}
 */
export function oneAtATime(source, action) {
  /** @type {Promise<void> | null} */
  let running = null;
  let again = false;
  return function run() {
    again = running !== null;
    running ??= reporting(source, async () => {
      await action();
      clearError(source);
    }).finally(() => {
      running = null;
      if (again) run();
    });
    return running;
  };
}
