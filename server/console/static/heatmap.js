// Which tokens stay: a heat map by layer and position, the text under it, and two sliders that move through both.

import { post } from "./api.js";
import { by, element } from "./elements.js";
import { whole } from "./figures.js";
import { textOfBins } from "./tokens.js";

const scheme = matchMedia("(prefers-color-scheme: dark)");

/** Small shares are most of them: the square root tells them apart. The legend's marks say so. */
const shade = (share) => Math.sqrt(share);
const percent = (share) => `${(share * 100).toFixed(share < 0.0995 ? 1 : 0)} %`;

export class HeatMap {
  constructor() {
    for (const slider of [by("layer"), by("position")]) slider.addEventListener("input", () => this.select());
    for (const canvas of [by("heat"), by("strip")]) {
      canvas.addEventListener("pointerdown", (event) => this.point(event));
      canvas.addEventListener("pointermove", (event) => event.buttons && this.point(event));
    }
    by("text").addEventListener("click", ({ target }) => {
      if (target.dataset.bin) this.move({ position: target.dataset.bin });
    });
    scheme.addEventListener("change", () => this.told && this.draw());
  }

  hide() {
    by("kept").hidden = true;
    this.told = null;
  }

  /** Say why there is nothing to draw. */
  explain(words) {
    this.hide();
    by("kept").hidden = false;
    by("kept-body").hidden = true;
    by("kept-summary").textContent = words;
  }

  /**
   * @param {object} usage of the answer, with `kept_positions`.
   * @param {object} prompt what /tokenize takes for the same prompt.
   */
  async show(usage, prompt) {
    this.told = usage.kept_positions;
    const { by_layer: layers, bin_tokens: width, kv_heads: heads, tokens } = this.told;
    const { mean, min, max } = usage.kept_tokens;
    const size = layers[0].map((_, bin) => Math.min(width, tokens - bin * width));
    this.shares = layers.map((row) => row.map((count, bin) => count / (heads * size[bin])));
    this.mean = size.map((_, bin) => this.shares.reduce((sum, row) => sum + row[bin], 0) / layers.length);
    by("kept").hidden = by("kept-body").hidden = false;
    by("kept-summary").textContent =
      `Of ${whole(tokens)} tokens each head keeps ${whole(mean)} on average` +
      `${min === max ? "" : `, ${whole(min)} to ${whole(max)} by layer`}. ${layers.length} layers, ` +
      `${heads} KV heads, ${width === 1 ? "a column a token" : `${width} tokens a column`}.`;
    by("layer").max = layers.length;
    by("position").max = size.length - 1;
    by("layer").value = by("position").value = 0;
    by("layer-names").lastElementChild.textContent = layers.length - 1;
    by("ticks").replaceChildren(...[0, 0.25, 0.5, 0.75, 1].map((part) => element("span", { textContent: whole(part * tokens) })));
    this.texts = size.map(() => "");
    by("text").replaceChildren();
    this.table(mean);
    this.draw();
    await this.write(prompt);
  }

  /** Put the prompt's text under the map. */
  async write(prompt) {
    const told = this.told;
    try {
      const { token_strs: strings } = await post("tokenize", { ...prompt, return_token_strs: true });
      if (this.told !== told) return; // another answer's by now
      const texts = textOfBins(strings, told.bin_tokens);
      const exact = texts.join("").includes(prompt.messages.at(-1).content.trim());
      this.texts = this.mean.map((_, bin) => texts[bin] ?? "(the answer)");
      by("text-hint").dataset.exact = exact;
      if (!exact) this.note("This tokenizer's strings can't be turned back into the text exactly.");
      const parts = this.texts.map((text, bin) => element("span", { textContent: text }));
      parts.forEach((part, bin) => { part.dataset.bin = bin; });
      by("text").replaceChildren(...parts);
      this.select();
    } catch (error) {
      this.note(`The text can't be shown: ${error.message}`);
    }
  }

  note(words) {
    by("text").replaceChildren(element("em", { textContent: words }));
  }

  table(all) {
    const { by_layer: layers, kv_heads: heads } = this.told;
    const numbers = (words, kind) => element("tr", {}, ...words.map((text, i) => element(i ? "td" : kind, { textContent: text, ...(i || { scope: "row" }) })));
    const head = element("tr", {}, ...["Layer", "Tokens kept per head", "Of all"].map((text) => element("th", { scope: "col", textContent: text })));
    const rows = layers.map((row, layer) => {
      const kept = row.reduce((sum, count) => sum + count, 0) / heads;
      return numbers([layer, whole(kept), percent(kept / this.told.tokens)], "th");
    });
    rows.unshift(numbers(["all", whole(all), percent(all / this.told.tokens)], "th"));
    by("layers").querySelector("table")?.remove();
    by("layers").append(element("table", { className: "figures" }, element("thead", {}, head), element("tbody", {}, ...rows)));
  }

  draw() {
    paint(by("heat"), this.shares);
    paint(by("strip"), [this.mean]);
    by("heat").style.setProperty("--rows", this.shares.length);
    this.select();
  }

  point({ currentTarget: canvas, clientX, clientY }) {
    const box = canvas.getBoundingClientRect();
    const at = (share, count) => Math.max(0, Math.min(count - 1, Math.floor(share * count)));
    const layer = canvas === by("strip") ? 0 : 1 + at((clientY - box.top) / box.height, this.shares.length);
    this.move({ layer, position: at((clientX - box.left) / box.width, this.mean.length) });
  }

  move({ layer = by("layer").value, position = by("position").value }) {
    by("layer").value = layer;
    by("position").value = position;
    this.select();
  }

  /** Show the layer and the position that the sliders stand at. */
  select() {
    const layer = Number(by("layer").value) - 1, bin = Number(by("position").value);
    const row = this.shares[layer] ?? this.mean, { bin_tokens: width, tokens } = this.told;
    const first = bin * width, last = Math.min(first + width, tokens) - 1;
    const where = first === last ? `token ${whole(first)}` : `tokens ${whole(first)} to ${whole(last)}`;
    const who = layer < 0 ? "all layers" : `layer ${layer}`;
    by("layer").setAttribute("aria-valuetext", who);
    by("position").setAttribute("aria-valuetext", `${where}: ${percent(row[bin])} kept. ${this.texts[bin]}`);
    by("cell").replaceChildren(
      element("b", { textContent: `${who}, ${where}: ${percent(row[bin])} kept` }),
      element("q", { textContent: this.texts[bin].trim() }),
    );
    const cursor = by("cursor").style;
    cursor.setProperty("--x", bin / row.length);
    cursor.setProperty("--y", Math.max(layer, 0) / this.shares.length);
    cursor.setProperty("--w", 1 / row.length);
    cursor.setProperty("--h", layer < 0 ? 1 : 1 / this.shares.length);
    for (const part of by("text").children) {
      const share = row[part.dataset.bin];
      part.style.setProperty("--share", shade(share));
      part.className = (share ? "" : "none ") + (Number(part.dataset.bin) === bin ? "here" : "");
    }
    const here = by("text").querySelector(".here");
    if (here) by("text").scrollTop = here.offsetTop - by("text").clientHeight / 3;
  }
}

/** One pixel a cell, from the page's lightest heat to its darkest. */
function paint(canvas, rows) {
  const style = getComputedStyle(document.documentElement);
  const [from, to] = ["--heat-none", "--heat-all"].map((name) => style.getPropertyValue(name).match(/[0-9a-f]{2}/gi).map((hex) => parseInt(hex, 16)));
  canvas.width = rows[0].length;
  canvas.height = rows.length;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  rows.flat().forEach((share, cell) => {
    from.forEach((channel, i) => { image.data[cell * 4 + i] = channel + (to[i] - channel) * shade(share); });
    image.data[cell * 4 + 3] = 255;
  });
  context.putImageData(image, 0, 0);
}
