/** 'Look inside': attention, position encodings and n-grams of the context. */
import { inspect } from "./api.js";
import { Arcs } from "./arcs.js";
import { byId, fillSelect, html, numbered, score, visible } from "./dom.js";
import { Matrix } from "./matrix.js";
import { PositionMap } from "./positions.js";
import { oneAtATime } from "./status.js";

/** @typedef {"raw" | "masked" | "weights"} Stage */
/** @typedef {Object<Stage, (?number)[][]>} Attention null in a matrix is minus infinity */
/** @typedef {{tokens: string[], attention: ?Attention, positions: ?object, ngrams: object[]}} Inspection */

/**
 * @param {() => string} context @param {() => import("./api.js").Model | undefined} model
 * @returns {{show: () => Promise<void>}}
 */
export function startInspection(context, model) {
  /** @type {Inspection | null} */
  let found = null;
  let query = 0;
  const matrix = new Matrix(byId("matrix"), select);
  const arcs = new Arcs(byId("arcs"), select);
  const positions = new PositionMap(byId("positions"), byId("position-value"));

  const show = oneAtATime("inside", async () => {
    const chosen = model();
    if (!chosen) return;
    offerLayers(chosen);
    const text = [...context()].slice(-Number(byId("window").value)).join("");
    found = await inspect({
      model: chosen.id,
      text,
      layer: Number(byId("layer").value),
      head: Number(byId("head").value),
    });
    query = found.tokens.length - 1;
    draw();
  });

  function draw() {
    if (!found) return;
    const stage = chosenStage();
    byId("attention").hidden = !found.attention;
    byId("no-attention").hidden = Boolean(found.attention);
    byId("stage-help").textContent = HELP[stage];
    if (found.attention) {
      matrix.draw(found.tokens, found.attention[stage], stage);
      arcs.draw(found.tokens, found.attention[stage], stage);
    }
    positions.draw(found.positions);
    select(Math.min(query, found.tokens.length - 1));
  }

  /** Select a query, and a key of it. */
  function select(row, column = null) {
    query = row;
    matrix.select(row, column);
    arcs.select(row);
    describe(found, row, column);
    listNgrams(found, row, model());
  }

  if (matchMedia("(max-width: 600px)").matches) byId("window").value = "16"; // labels would be too small to read
  for (const id of ["layer", "head", "window"]) byId(id).addEventListener("input", show);
  byId("stages").addEventListener("input", draw);
  return { show };
}

const HELP = {
  raw: "Scores q · k / √D of each query with each key, before the mask.",
  masked: "Scores after the causal mask: keys that come after the query are −∞ (left out).",
  weights: "Attention weights: softmax of the masked scores. Each row sums to 1.",
};

/** @returns {Stage} */
const chosenStage = () => /** @type {any} */ (document.querySelector("[name=stage]:checked")).value;

function offerLayers(model) {
  for (const [id, count] of [
    ["layer", model.layers],
    ["head", model.heads],
  ]) {
    fillSelect(byId(id), numbered(Math.max(1, count)));
    byId(id).disabled = count < 2;
  }
}

/** Say in words what is selected. */
function describe(found, row, column) {
  if (!found?.attention) return;
  const stage = chosenStage();
  const values = found.attention[stage][row];
  const name = (index) => `${index + 1} ‘${found.tokens[index]}’`;
  const keys = column === null ? strongest(values) : [column];
  const quantity = stage === "weights" ? "weight" : "score";
  const listed = keys.map((key) => `key ${name(key)} ${score(values[key])}`).join(", ");
  byId("attention-value").textContent =
    `Query ${name(row)}: ${column === null ? `largest ${quantity}s: ` : `${quantity} of `}${listed}`;
}

function strongest(values) {
  const order = values.map((_, index) => index).filter((index) => values[index] !== null);
  return order.sort((a, b) => values[b] - values[a]).slice(0, 3);
}

function listNgrams(found, row, model) {
  const own = found.ngrams.filter((each) => each.position === row + 1);
  byId("ngram-help").textContent = ngramHelp(found, row, model, own);
  byId("ngrams").parentElement.hidden = own.length === 0;
  byId("ngrams").replaceChildren(
    ...own.map(({ n, text, row: place, rows, shared }) =>
      html(
        "tr",
        {},
        html("th", { scope: "row", textContent: n }),
        html("td", { className: "ngram", textContent: visible(text) }),
        html("td", { textContent: `${place.toLocaleString("en")} of ${rows.toLocaleString("en")}` }),
        html("td", { textContent: shared ? "possibly" : "no" }),
      ),
    ),
  );
}

function ngramHelp(found, row, model, own) {
  if (model?.ngram === undefined || model.ngram < 2) return "This model looks up single tokens only.";
  if (!own.length) return "No n-gram ends at this position.";
  const hashed = own.some(({ shared }) => shared)
    ? " Where there are more n-grams than rows, rows are hashed and shared."
    : "";
  return `Looked up at query ${row + 1} ‘${found.tokens[row]}’: the n-grams that end there.${hashed}`;
}
