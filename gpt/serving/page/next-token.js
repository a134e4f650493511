/** The next-token distribution as a table of bars: of the model, and after the sampling settings. */
import { nextTokens } from "./api.js";
import { byId, ending, html, percent, visible } from "./dom.js";
import { sampling } from "./settings.js";
import { oneAtATime } from "./status.js";

const SHOWN = 12;
const ROUNDING = 1e-5; // of sums of probabilities
const SCALES = [0.25, 0.5, 1];

/** @typedef {{text: string, before: number, after: number}} Row */

/**
 * @param {() => string} context the text whose next token is shown
 * @returns {() => Promise<void>} shows the distribution of the present settings and context
 */
export const nextToken = (context) =>
  oneAtATime("next-token", async () => {
    const text = context();
    const rows = await nextTokens({ ...sampling(), text });
    draw(rows, text);
  });

/** @param {Row[]} rows @param {string} text */
function draw(rows, text) {
  const shown = [...rows.slice(0, SHOWN), ...rest(rows.slice(SHOWN), rows)];
  const largest = Math.max(...shown.flatMap((row) => [row.before, row.after]));
  const scale = SCALES.find((limit) => largest <= limit) ?? 1;
  const body = byId("distribution");
  while (body.children.length > shown.length) body.lastChild.remove();
  while (body.children.length < shown.length) body.append(emptyRow());
  shown.forEach((row, index) => fill(body.children[index], row, scale));
  const kept = rows.filter((row) => row.after > 0).length;
  byId("context").textContent = text ? ending(text, 18) : "↵";
  byId("kept").textContent = `${kept} of ${rows.length} tokens can be sampled. Bars: 0 to ${percent(scale)}.`;
}

/** One row for all other tokens. */
function rest(others, rows) {
  if (!others.length) return [];
  const total = (name) => 1 - rows.slice(0, SHOWN).reduce((sum, row) => sum + row[name], 0);
  const [before, after] = ["before", "after"].map(total).map((value) => (value < ROUNDING ? 0 : value));
  return [{ text: null, label: "others", before, after }];
}

/** Rows are reused, so that bars move instead of being replaced. */
function emptyRow() {
  const bars = html(
    "td",
    { className: "bars" },
    html("span", { className: "before" }),
    html("span", { className: "after" }),
  );
  return html("tr", {}, html("th", { scope: "row" }), bars, html("td"), html("td"));
}

function fill(element, row, scale) {
  const [label, bars, before, after] = element.children;
  label.textContent = row.text === null ? row.label : visible(row.text);
  bars.firstChild.style.setProperty("--length", String(Math.min(1, row.before / scale)));
  bars.lastChild.style.setProperty("--length", String(Math.min(1, row.after / scale)));
  before.textContent = percent(row.before);
  after.textContent = row.after > 0 ? percent(row.after) : "–";
  element.classList.toggle("excluded", row.after === 0);
  element.classList.toggle("others", row.text === null);
}
