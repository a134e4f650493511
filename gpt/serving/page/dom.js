/** Helpers to build elements and to format values. Text always enters as text, never as HTML. */

const SVG = "http://www.w3.org/2000/svg";
const WHITESPACE = { " ": "␣", "\n": "↵", "\t": "⇥" };

/** @param {string} id @returns {any} the element with this id */
export const byId = (id) => document.getElementById(id);

/**
 * Create an HTML element.
 * @param {string} tag
 * @param {Object<string, unknown>} [properties] properties; names with a dash become attributes
 * @param {...(Node | string)} children
 * @returns {any}
 */
export function html(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, String(value));
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/**
 * Create an SVG element.
 * @param {string} tag
 * @param {Object<string, string | number>} [attributes]
 * @param {...(Node | string)} children
 * @returns {SVGElement}
 */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

/** @param {string} token @returns {string} the token with symbols for whitespace */
export const visible = (token) => token.replace(/[ \n\t]/g, (char) => WHITESPACE[char]) || "∅";

/** @param {string} text @param {number} limit @returns {string} its end, with symbols for whitespace */
export function ending(text, limit) {
  const characters = [...text];
  return (characters.length > limit ? "…" : "") + visible(characters.slice(-limit).join(""));
}

/** @param {number} probability @returns {string} */
export function percent(probability) {
  if (probability === 0) return "0%";
  if (probability < 0.0001) return "<0.01%";
  if (probability > 0.99 && probability < 1) return `${Math.min(99.9, 100 * probability).toFixed(1)}%`;
  return `${(100 * probability).toFixed(probability < 0.01 ? 2 : probability < 0.1 ? 1 : 0)}%`;
}

/** @param {number | null} value @returns {string} a score with two decimals; null is minus infinity */
export const score = (value) => (value === null ? "−∞" : value.toFixed(2).replace("-", "−"));

/**
 * Delay a function until it has not been called for a while.
 * @param {() => void} action @param {number} milliseconds @returns {() => void}
 */
export function debounce(action, milliseconds) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, milliseconds);
  };
}

/**
 * Replace the options; the selected value stays selected if there is such an option.
 * @param {HTMLSelectElement} select @param {{value: string, text: string}[]} options
 */
export function fillSelect(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map((option) => html("option", option)));
  if (options.some((option) => option.value === before)) select.value = before;
}

/** @param {number} count @returns {{value: string, text: string}[]} the options 1 to count */
export const numbered = (count) =>
  Array.from({ length: count }, (_, index) => ({ value: `${index + 1}`, text: `${index + 1}` }));
