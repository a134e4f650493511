/** The text: each token coloured by its probability, with its alternatives on hover, on focus and on tap. */
import { html, percent, visible } from "./dom.js";
import { Popover } from "./popover.js";

/** @typedef {import("./api.js").Token} Token */

const HOVER_MS = 70; // the pointer may cross other tokens on its way to the alternatives
let views = 0;

export class TextView {
  /**
   * @param {HTMLElement} frame contains the text and the popover
   * @param {string} label read by screen readers
   * @param {(prefix: string, known: Token[]) => void} goOn called when the user chooses an alternative, with
   * the text that ends in it, and the tokens before it
   * @param {(index: number | null) => void} [selected] called when another token is selected
   */
  constructor(frame, label, goOn, selected = () => {}) {
    /** @type {Token[]} */
    this.tokens = [];
    /** @type {number | null} */
    this.index = null;
    /** @type {AbortSignal | null} of the request that fills it */
    this.signal = null;
    this.selected = selected;
    this.name = `text-${(views += 1)}`;
    this.element = html("div", {
      className: "text",
      tabIndex: 0,
      role: "listbox",
      "aria-label": label,
      "aria-orientation": "horizontal",
    });
    this.popover = new Popover(
      (alternative) => goOn(this.text(this.popover.index) + alternative, this.tokens.slice(0, this.popover.index)),
      () => this.element.focus(),
    );
    frame.append(this.element, this.popover.element);
    this.clear();
    this.#listen(frame);
  }

  /**
   * Remove the text.
   * @param {number} [promptLength] the first characters of the next text that are its prompt
   * @param {Token[]} [known] tokens with which it begins, with their probabilities: the server scores no prompt that is
   * longer than the context window
   */
  clear(promptLength = 0, known = []) {
    this.tokens = [];
    this.known = known;
    this.promptLength = promptLength;
    this.length = 0;
    this.generated = 0;
    this.index = null;
    this.popover.hide();
    this.element.replaceChildren();
    this.element.removeAttribute("aria-activedescendant");
  }

  /** @param {Token[]} tokens */
  append(tokens) {
    const first = this.tokens.length;
    const better = tokens.map((token, offset) =>
      this.known[first + offset]?.text === token.text ? this.known[first + offset] : token,
    );
    const spans = better.map((token, offset) => this.#span(token, first + offset));
    this.tokens.push(...better);
    this.element.append(...spans);
  }

  /** @param {number | null} [end] a number of tokens; null: all @returns {string} */
  text(end = null) {
    return this.tokens
      .slice(0, end ?? this.tokens.length)
      .map((token) => token.text)
      .join("");
  }

  /** @param {number | null} index select a token and show its alternatives; null: none */
  select(index) {
    this.#mark(this.index, false);
    this.index = index;
    if (index === null) this.popover.hide();
    else this.#show(index);
    this.#mark(index, true);
    this.selected(index);
  }

  #span(token, index) {
    const names = ["token"];
    if (token.text.includes("\n")) names.push("newline");
    if (this.length < this.promptLength) names.push("prompt");
    else this.generated += 1;
    if (token.probability === null) names.push("unknown");
    this.length += token.text.length;
    const description = token.probability === null ? "" : `, ${percent(token.probability)}`;
    const span = html("span", {
      className: names.join(" "),
      id: `${this.name}-${index}`,
      textContent: token.text,
      role: "option",
      "aria-selected": false,
      "aria-label": `${visible(token.text)}${description}`,
    });
    if (token.probability !== null) span.style.setProperty("--surprise", surprise(token.probability).toFixed(3));
    return span;
  }

  #listen(frame) {
    const { element } = this;
    element.addEventListener("pointerover", (event) => this.#hover(event));
    frame.addEventListener("pointerleave", () => this.#leave());
    this.popover.element.addEventListener("pointerenter", () => clearTimeout(this.timer));
    element.addEventListener("click", (event) => this.#click(event));
    element.addEventListener("keydown", (event) => this.#key(event));
    document.addEventListener("pointerdown", (event) => {
      if (this.index !== null && !(/** @type {Element} */ (event.target).closest(".frame, .keeps-selection")))
        this.select(null);
    });
  }

  #hover(event) {
    const index = indexOf(event.target);
    clearTimeout(this.timer);
    if (event.pointerType === "touch" || index === null) return;
    this.timer = setTimeout(() => this.#show(index), HOVER_MS);
  }

  #leave() {
    clearTimeout(this.timer);
    if (this.index === null) this.popover.hide();
    else this.#show(this.index);
  }

  #click(event) {
    const index = indexOf(event.target);
    clearTimeout(this.timer);
    if (getSelection()?.isCollapsed !== false) this.select(index);
  }

  #key(event) {
    const last = this.tokens.length - 1;
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    const ends = { Home: 0, End: last };
    if (event.key === "Escape" && this.index !== null) this.select(null);
    else if (event.key === "Enter" && this.index !== null) this.popover.focus();
    else if (event.key in ends && last >= 0) this.select(ends[event.key]);
    else if (event.key in steps && last >= 0) this.select(this.#moved(steps[event.key], last));
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #moved(step, last) {
    return this.index === null ? (step > 0 ? 0 : last) : Math.max(0, Math.min(last, this.index + step));
  }

  #show(index) {
    this.popover.show(index, this.tokens[index], this.element.children[index]);
  }

  #mark(index, on) {
    const span = index === null ? null : this.element.children[index];
    span?.setAttribute("aria-selected", String(on));
    if (span && on) this.element.setAttribute("aria-activedescendant", span.id);
    else this.element.removeAttribute("aria-activedescendant");
  }
}

/** @param {number} probability @returns {number} 0 for a certain token, 1 for a probability of 0.1% or less */
const surprise = (probability) => Math.min(1, Math.max(0, -Math.log10(probability) / 3));

function indexOf(target) {
  const span = target.closest?.(".token");
  return span ? Number(span.id.slice(span.id.lastIndexOf("-") + 1)) : null;
}
