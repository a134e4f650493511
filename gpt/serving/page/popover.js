/** The alternatives of a token, in a box below it. */
import { html, percent, visible } from "./dom.js";

export class Popover {
  /** @param {(alternative: string) => void} choose @param {() => void} leave called when the keyboard leaves the box */
  constructor(choose, leave) {
    this.index = 0;
    this.leave = leave;
    this.choose = choose;
    this.head = html("p", { "aria-live": "polite" });
    this.list = html("ol");
    const hint = html("p", { className: "hint", textContent: "Choose one to go on from there." });
    this.element = html(
      "div",
      { className: "popover", hidden: true, role: "group", "aria-label": "Alternatives" },
      this.head,
      this.list,
      hint,
    );
    this.element.addEventListener("keydown", (event) => this.#key(event));
  }

  /** @param {number} index @param {import("./api.js").Token} token @param {HTMLElement} anchor the span of the token */
  show(index, token, anchor) {
    this.index = index;
    this.head.replaceChildren(html("b", { textContent: visible(token.text) }), ` ${describe(token)}`);
    this.list.replaceChildren(...token.alternatives.map((each) => html("li", {}, this.#button(each, token))));
    this.element.lastChild.hidden = token.alternatives.length === 0;
    this.element.hidden = false;
    this.#place(anchor);
  }

  /** Hide the box. */
  hide() {
    this.element.hidden = true;
  }

  /** Move the keyboard to the first alternative. */
  focus() {
    this.list.querySelector("button")?.focus();
  }

  #button({ text, probability }, token) {
    const chosen = text === token.text;
    const bar = html("span", { className: "bar" });
    bar.style.setProperty("--length", String(probability));
    const name = `${visible(text)} ${percent(probability)}${chosen ? ", in the text" : ""}`;
    const parts = [html("b", { textContent: visible(text) }), bar, html("span", { textContent: percent(probability) })];
    const button = html("button", { type: "button", className: chosen ? "chosen" : "", "aria-label": name }, ...parts);
    button.addEventListener("click", () => this.choose(text));
    return button;
  }

  /** Below the token, within the width of the frame. */
  #place(anchor) {
    const { element } = this;
    const largest = element.offsetParent.clientWidth - element.offsetWidth;
    element.style.left = `${Math.max(0, Math.min(largest, anchor.offsetLeft - 12))}px`;
    element.style.top = `${anchor.offsetTop + anchor.offsetHeight}px`;
  }

  #key(event) {
    const buttons = [...this.list.querySelectorAll("button")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      const next = buttons.indexOf(document.activeElement) + step;
      buttons[(next + buttons.length) % buttons.length].focus();
    } else if (event.key === "Escape") this.leave();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

const describe = ({ probability }) =>
  probability === null
    ? "has no probability: it is the first token of the context."
    : `${percent(probability)} probable`;
