/** The form of settings. It is kept in the fragment of the address: a reload or a copied link restores it. */
import { byId, debounce } from "./dom.js";

const form = () => /** @type {HTMLFormElement} */ (byId("settings"));
const SLIDERS = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"];
const save = debounce(write, 200);

/** @param {string} name @returns {any} the field of this name */
export const field = (name) => form().elements.namedItem(name);

/** @returns {Object<string, any>} the model and the sampling settings; null is off */
export function sampling() {
  const values = Object.fromEntries(
    SLIDERS.map((name) => [name, isOff(field(name)) ? null : Number(field(name).value)]),
  );
  return { model: field("model").value, ...values, repetition_penalty: values.repetition_penalty ?? 1 };
}

/** @returns {object} the settings of a completion */
export const completion = () => ({
  ...sampling(),
  max_tokens: whole(field("max_tokens"), 300),
  seed: whole(field("seed"), 1337),
});

/** Restore the settings of the address. */
export function restore() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    const found = field(name);
    if (found && !(found.options && ![...found.options].some((option) => option.value === value))) found.value = value;
  }
  update();
}

/** Keep the address and the shown values up to date. */
export function listen() {
  form().addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("input", update);
  byId("reset").addEventListener("click", reset);
}

/** Show the values of the sliders, and put all settings into the address. */
export function update() {
  for (const name of SLIDERS) {
    const input = field(name);
    input.nextElementSibling.value = isOff(input) ? "off" : input.value;
  }
  save();
}

function reset() {
  for (const name of SLIDERS) field(name).value = field(name).defaultValue;
  update();
  form().dispatchEvent(new Event("input"));
}

function write() {
  history.replaceState(null, "", `#${new URLSearchParams(/** @type {any} */ (new FormData(form())))}`);
}

const isOff = (input) => input.dataset.off === input.value;

function whole(input, otherwise) {
  if (!input.value || !input.checkValidity()) input.value = String(otherwise);
  return Number(input.value);
}
