/** The page: connects the form, the text, the next-token distribution, the inspection and the comparison. */
import { listModels, useKey } from "./api.js";
import { startComparison } from "./compare.js";
import { byId, debounce, fillSelect } from "./dom.js";
import { streamInto } from "./generate.js";
import { startInspection } from "./inside.js";
import { nextToken } from "./next-token.js";
import * as settings from "./settings.js";
import { clearError, report, reporting } from "./status.js";
import { TextView } from "./text-view.js";

/** @type {import("./api.js").Model[]} */
let models = [];
let textModel = ""; // the one that generated the text
let edited = true; // the prompt, since the text was generated
let running = new AbortController();

const view = new TextView(byId("frame"), "Generated text", goOn, selected);
const showNext = nextToken(context);
const inspection = startInspection(context, () => model());
const refresh = debounce(() => Promise.all([showNext(), inspection.show()]), 60);

/** The text that comes before the token in question: the selected one, or the next one. */
function context() {
  return edited ? settings.field("prompt").value : view.text(view.index);
}

const model = () => models.find((each) => each.id === settings.field("model").value);

/** Generate from the prompt in the form. */
async function generate(known = []) {
  if (!models.length) await connect();
  if (!models.length) return;
  running.abort();
  running = new AbortController();
  const { signal } = running;
  edited = false;
  setBusy(true);
  report("generate", "Generating…", "busy");
  await reporting("generate", async () => {
    const body = { ...settings.completion(), prompt: settings.field("prompt").value };
    textModel = body.model;
    report("generate", await streamInto(view, body, signal, known));
  });
  if (running.signal !== signal) return;
  setBusy(false);
  if (!view.tokens.length) edited = true;
  refresh();
}

function stop() {
  if (byId("stop").disabled) return;
  running.abort();
  report("generate", `Stopped after ${view.generated} tokens.`);
}

function goOn(prompt, known) {
  settings.field("prompt").value = prompt;
  settings.update();
  view.element.focus();
  return generate(textModel === settings.field("model").value ? known : []);
}

function selected(index) {
  if (index !== null) edited = false;
  refresh();
}

function anotherSeed() {
  settings.field("seed").value = String(Math.floor(Math.random() * 100_000));
  settings.update();
  return generate();
}

function setBusy(busy) {
  byId("stop").disabled = !busy;
  byId("frame").classList.add("filled");
}

function describeModel() {
  const chosen = model();
  if (!chosen) return;
  const parts = [
    ...(chosen.kind === "gpt" ? [`${chosen.layers} layers`, `${chosen.heads} heads`] : [chosen.kind]),
    `context ${chosen.block_size}`,
    `position ${chosen.position}`,
    ...(chosen.ngram > 1 ? [`n-grams up to ${chosen.ngram}`] : []),
    `vocabulary ${chosen.vocab_size} (${chosen.tokenizer})`,
    `${(chosen.parameters / 1e6).toFixed(2)} M parameters`,
    `SHA-256 ${chosen.sha256.slice(0, 8)}`,
  ];
  byId("about").textContent = parts.join(" · ");
  settings.field("top_k").max = Math.min(100, chosen.vocab_size);
}

/** Load the list of models; the first one is the default. */
async function load() {
  models = await listModels();
  const options = models.map(({ id }) => ({ value: id, text: id }));
  for (const select of [settings.field("model"), byId("model-a"), byId("model-b")]) fillSelect(select, options);
  byId("model-b").value = (models[1] ?? models[0]).id;
  byId("key-form").hidden = true;
}

function listen() {
  settings.listen();
  byId("generate").addEventListener("click", () => generate());
  byId("stop").addEventListener("click", stop);
  byId("again").addEventListener("click", anotherSeed);
  byId("settings").addEventListener("input", showNext);
  settings.field("model").addEventListener("input", () => {
    describeModel();
    refresh();
  });
  settings.field("prompt").addEventListener("input", () => {
    edited = true;
    clearError("generate");
    refresh();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  });
  document.addEventListener("key-needed", () => (byId("key-form").hidden = false));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(byId("key").value);
    connect();
  });
}

/** Fetch the models; again after a missing API key was given. */
function connect() {
  return reporting("connect", async () => {
    await load();
    settings.restore();
    describeModel();
    clearError("connect");
    refresh();
  });
}

listen();
startComparison(() => view.text() || settings.field("prompt").value);
connect();
