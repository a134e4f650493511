/** Attention as arcs from a query to its keys, over the tokens in a line. */
import { svg } from "./dom.js";
import { scale } from "./matrix.js";

const FAINT = 0.3; // strength from which on the arcs of the other queries are drawn

export class Arcs {
  /** @param {SVGElement} element @param {(row: number) => void} select */
  constructor(element, select) {
    this.element = element;
    this.onSelect = select;
    element.addEventListener("pointerover", (event) => {
      const { row } = /** @type {SVGElement} */ (event.target).dataset;
      if (row !== undefined) select(Number(row));
    });
    element.addEventListener("keydown", (event) => this.#key(event));
  }

  /** @param {string[]} tokens @param {(?number)[][]} values @param {string} stage */
  draw(tokens, values, stage) {
    this.values = values;
    this.width = this.element.clientWidth || 600;
    this.step = this.width / tokens.length;
    this.height = this.width / 2;
    this.strength = scale(values, stage);
    this.element.setAttribute("viewBox", `0 0 ${this.width} ${this.height + 26}`);
    const faint = stage === "weights" ? values.flatMap((row, query) => this.#arcs(row, query, FAINT)) : [];
    this.own = svg("g", { class: "own" });
    this.labels = tokens.map((token, index) => this.#label(token, index));
    this.element.replaceChildren(svg("g", { class: "faint" }, ...faint), this.own, ...this.labels);
  }

  /** @param {number} row the query whose arcs are highlighted */
  select(row) {
    if (!this.own) return;
    this.row = row;
    this.own.replaceChildren(...this.#arcs(this.values[row], row, 0.05));
    this.labels.forEach((label, index) => label.classList.toggle("on", index === row));
  }

  /** The arcs of a query. A key that is the query itself gets a loop. */
  #arcs(row, query, threshold) {
    return row.flatMap((value, key) => {
      if (value === null) return [];
      const { amount, sign } = this.strength(value);
      if (amount < threshold) return [];
      const arc = svg("path", {
        d: this.#path(query, key),
        class: sign,
        "stroke-width": (0.5 + 6 * amount).toFixed(2),
        "data-key": key,
      });
      /** @type {any} */ (arc).style.setProperty("--amount", amount.toFixed(3));
      return [arc];
    });
  }

  #path(query, key) {
    const [from, to] = [this.#middle(query), this.#middle(key)];
    const radius = Math.abs(from - to) / 2;
    if (!radius) return `M ${from - 4} ${this.height} c -6 -18 14 -18 8 0`;
    return `M ${from} ${this.height} A ${radius} ${radius} 0 0 ${from > to ? 0 : 1} ${to} ${this.height}`;
  }

  #middle(index) {
    return (index + 0.5) * this.step;
  }

  #label(token, index) {
    const middle = this.#middle(index);
    const text = svg(
      "text",
      { x: middle, y: this.height + 16, "text-anchor": "middle", "font-size": Math.min(14, this.step * 1.3) },
      [...token].slice(0, Math.max(1, Math.floor(this.step / 8))).join(""),
    );
    const target = svg("rect", {
      x: middle - this.step / 2,
      y: this.height,
      width: this.step,
      height: 26,
      "data-row": index,
    });
    return svg("g", { class: "token-label" }, text, target);
  }

  #key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || this.row === undefined) return;
    event.preventDefault();
    this.onSelect(Math.max(0, Math.min(this.values.length - 1, this.row + step)));
  }
}
