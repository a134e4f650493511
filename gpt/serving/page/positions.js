/** The position encodings as a heat map, with a colour for each sign. */
import { byId, score } from "./dom.js";
import { labelScale, largestSize } from "./matrix.js";

const MEANINGS = {
  learned: "a trained vector for each position, added to the embedding.",
  sinusoidal: "sines and cosines of increasing wavelengths, added to the embedding.",
  rotary: "cosine of the angle by which each pair of channels of queries and keys is rotated.",
  relative: "length of the trained vector for each distance between query and key.",
  alibi: "bias added to the score, by the distance between query and key.",
};

export class PositionMap {
  /** @param {HTMLCanvasElement} canvas @param {HTMLElement} readout */
  constructor(canvas, readout) {
    this.canvas = canvas;
    this.readout = readout;
    /** @type {any} */
    this.positions = null;
    this.at = { row: 0, column: 0 };
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw(this.positions));
  }

  /** @param {?{scheme: string, rows: string[], columns: string, values: number[][]}} positions */
  draw(positions) {
    this.positions = positions;
    byId("position-figure").hidden = byId("position-scale").hidden = !positions;
    byId("position-help").textContent = positions
      ? `Scheme ${positions.scheme}: ${MEANINGS[positions.scheme] ?? ""}`
      : "This model has no position encodings.";
    if (!positions) return;
    const { values } = positions;
    const [height, width] = [values.length, values[0].length];
    Object.assign(this.canvas, { width, height });
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const largest = largestSize(values);
    labelScale(byId("position-scale"), largest, true);
    const colours = this.#colours();
    values.flat().forEach((value, index) => image.data.set(mixed(colours, value / largest), 4 * index));
    context.putImageData(image, 0, 0);
    byId("position-rows").textContent = `${positions.rows[0]} to ${positions.rows.length}`;
    byId("position-columns").textContent = `${positions.columns} 0 to ${width - 1} →`;
    this.#describe();
  }

  /** The colours of the theme as bytes: a canvas cannot use CSS variables. */
  #colours() {
    const style = getComputedStyle(this.canvas);
    const bytes = (name) =>
      style
        .getPropertyValue(name)
        .match(/[0-9a-f]{2}/gi)
        .map((byte) => parseInt(byte, 16));
    return { zero: bytes("--zero"), positive: bytes("--positive"), negative: bytes("--negative") };
  }

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    const cell = (offset, length, count) => Math.max(0, Math.min(count - 1, Math.floor((offset / length) * count)));
    this.at = {
      row: cell(event.clientY - box.top, box.height, this.canvas.height),
      column: cell(event.clientX - box.left, box.width, this.canvas.width),
    };
    this.#describe();
  }

  #key(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    this.at.row = Math.max(0, Math.min(this.canvas.height - 1, this.at.row + step[0]));
    this.at.column = Math.max(0, Math.min(this.canvas.width - 1, this.at.column + step[1]));
    this.#describe();
  }

  #describe() {
    const { rows, columns, values } = this.positions;
    const row = Math.min(this.at.row, rows.length - 1);
    const column = Math.min(this.at.column, values[row].length - 1);
    this.readout.textContent = `${rows[row]}, ${columns} ${column}: ${score(values[row][column])}`;
  }
}

function mixed({ zero, positive, negative }, value) {
  const end = value < 0 ? negative : positive;
  return [...zero.map((byte, index) => Math.round(byte + (end[index] - byte) * Math.abs(value))), 255];
}
