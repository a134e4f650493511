/** The attention matrix: rows are queries, columns are keys. */
import { byId, score, svg } from "./dom.js";

const SIZE = 560; // of the cells, in units of the drawing
const MAX_LABEL = 7;

export class Matrix {
  /** @param {SVGElement} element @param {(row: number, column?: number | null) => void} select */
  constructor(element, select) {
    this.element = element;
    this.onSelect = select;
    element.addEventListener("pointerover", (event) => this.#point(event));
    element.addEventListener("keydown", (event) => this.#key(event));
  }

  /** @param {string[]} tokens @param {(?number)[][]} values null: minus infinity @param {string} stage */
  draw(tokens, values, stage) {
    this.count = tokens.length;
    this.cell = Math.min(28, SIZE / this.count);
    const labels = tokens.map((token) => (token.length > MAX_LABEL ? `${token.slice(0, MAX_LABEL - 1)}…` : token));
    this.font = Math.min(13, this.cell * 0.95);
    this.margin = Math.max(...labels.map((label) => label.length)) * this.font * 0.65 + 8;
    const total = this.margin + this.count * this.cell + 1;
    this.element.setAttribute("viewBox", `0 0 ${total} ${total}`);
    this.element.style.maxWidth = `${total}px`;
    this.outline = svg("rect", { class: "query", height: this.cell, x: this.margin, width: this.count * this.cell });
    this.key = svg("rect", { class: "key", height: this.cell, width: this.cell, visibility: "hidden" });
    labelScale(byId("matrix-scale"), largestSize(values), stage !== "weights");
    const cells = svg("g", { class: `cells ${stage}` }, ...this.#cells(values, stage));
    this.element.replaceChildren(...this.#labels(labels), cells, this.outline, this.key);
  }

  /** @param {number} row @param {number | null} column */
  select(row, column) {
    if (!this.outline) return;
    this.row = row;
    this.column = column;
    this.outline.setAttribute("y", String(this.#at(row)));
    this.key.setAttribute("visibility", column === null ? "hidden" : "visible");
    this.key.setAttribute("x", String(this.#at(column ?? 0)));
    this.key.setAttribute("y", String(this.#at(row)));
    this.element.querySelectorAll("text").forEach((label) => {
      const { axis, index } = label.dataset;
      label.classList.toggle("on", Number(index) === (axis === "row" ? row : column));
    });
  }

  #at(index) {
    return this.margin + index * this.cell;
  }

  #cells(values, stage) {
    const strength = scale(values, stage);
    return values.flatMap((row, y) =>
      row.map((value, x) => {
        if (value === null || (stage === "weights" && x > y)) return svg("rect", this.#box(x, y, "hidden-key"));
        const { amount, sign } = strength(value);
        const cell = svg("rect", this.#box(x, y, sign));
        /** @type {any} */ (cell).style.setProperty("--amount", amount.toFixed(3));
        return cell;
      }),
    );
  }

  #box(x, y, name) {
    return {
      x: this.#at(x),
      y: this.#at(y),
      width: this.cell,
      height: this.cell,
      class: name,
      "data-row": y,
      "data-column": x,
    };
  }

  #labels(labels) {
    return labels.flatMap((label, index) => {
      const middle = this.#at(index) + this.cell / 2;
      const shared = { "font-size": this.font, "data-index": index };
      const row = svg(
        "text",
        {
          ...shared,
          "data-axis": "row",
          x: this.margin - 5,
          y: middle,
          "text-anchor": "end",
          "dominant-baseline": "central",
        },
        label,
      );
      const turned =
        label.length > 1
          ? {
              transform: `rotate(-90 ${middle} ${this.margin - 5})`,
              "text-anchor": "start",
              "dominant-baseline": "central",
            }
          : { "text-anchor": "middle" };
      return [row, svg("text", { ...shared, "data-axis": "column", x: middle, y: this.margin - 5, ...turned }, label)];
    });
  }

  #point(event) {
    const { row, column } = event.target.dataset;
    if (row !== undefined) this.onSelect(Number(row), Number(column));
  }

  #key(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step || this.row === undefined) return;
    event.preventDefault();
    const inside = (index) => Math.max(0, Math.min(this.count - 1, index));
    this.onSelect(inside(this.row + step[0]), inside((this.column ?? this.row) + step[1]));
  }
}

/**
 * How strongly a value is drawn. Weights: by their square root, so that small ones are visible. Scores: by their size,
 * with a colour for each sign.
 * @param {(?number)[][]} values @param {string} stage
 * @returns {(value: number) => {amount: number, sign: string}}
 */
export function scale(values, stage) {
  if (stage === "weights") return (value) => ({ amount: Math.sqrt(value), sign: "positive" });
  const largest = largestSize(values);
  return (value) => ({ amount: Math.abs(value) / largest, sign: value < 0 ? "negative" : "positive" });
}

/** @param {(?number)[][]} values @returns {number} the largest absolute value */
export function largestSize(values) {
  return (
    Math.max(
      ...values
        .flat()
        .filter((value) => value !== null)
        .map(Math.abs),
    ) || 1
  );
}

/** Label a colour scale. @param {HTMLElement} element @param {number} largest @param {boolean} signed */
export function labelScale(element, largest, signed) {
  const [low, ramp, high] = element.children;
  low.textContent = signed ? score(-largest) : "0";
  high.textContent = signed ? score(largest) : "1";
  ramp.classList.toggle("signed", signed);
}
