// What an answer took, as rows of a table: one column for each side.

import { element } from "./elements.js";

export const whole = (number) => Math.round(number).toLocaleString("en");

export const seconds = (ms) => (ms < 9950 ? `${(ms / 1000).toFixed(2)} s` : `${(ms / 1000).toFixed(1)} s`);

function memory(bytes) {
  const unit = bytes >= 1 << 30 ? ["GiB", 2 ** 30] : ["MiB", 2 ** 20];
  const value = bytes / unit[1];
  return `${value >= 10 || value === 0 ? Math.round(value) : value.toFixed(1)} ${unit[0]}`;
}

const steps = (counts) => Object.entries(counts).filter(([, n]) => n).map(([mode, n]) => `${n} ${mode}`).join(", ");

const ROWS = [
  ["Time to first token", ({ first }) => first, seconds, true],
  ["Time per token after it", ({ perToken }) => perToken, (ms) => `${Math.round(ms)} ms`],
  ["Tokens of the prompt", ({ usage }) => usage?.prompt_tokens, whole],
  ["from the prefix cache", ({ usage }) => usage?.prompt_tokens_details?.cached_tokens || undefined, whole],
  ["Kept per layer and head", ({ usage }) => usage?.kv_cache?.kept_tokens.mean, whole],
  ["Memory held", ({ usage }) => usage?.kv_cache?.bytes_held, memory, true],
  ["Memory freed", ({ usage }) => usage?.kv_cache?.bytes_freed, memory],
  ["Attention computed", ({ usage }) => usage?.prefill_attention?.density?.mean, (share) => `${(share * 100).toFixed(1)} %`],
  ["Steps by what they read", ({ usage }) => usage?.decode_attention?.steps, steps],
];

/**
 * @param {{name: string, first?: number, perToken?: number, usage?: object}[]} sides
 */
export function figures(sides) {
  const head = element("tr", {}, element("td"), ...sides.map(({ name }) => element("th", { scope: "col", textContent: name })));
  const body = ROWS.flatMap(([label, pick, words, bars]) => {
    const values = sides.map(pick);
    if (values.every((value) => value === undefined)) return [];
    const most = Math.max(...values.map(Number).filter(Number.isFinite));
    const cells = values.map((value) => {
      const cell = element("td", { textContent: value === undefined ? "–" : words(value) });
      if (bars && value !== undefined && most) {
        const bar = element("span", { className: "bar" });
        bar.style.setProperty("--share", value / most);
        cell.append(bar);
      }
      return cell;
    });
    return [element("tr", {}, element("th", { scope: "row", textContent: label }), ...cells)];
  });
  const caption = element("caption", { className: "unseen", textContent: "What the answers took" });
  return element("table", { className: "figures" }, caption, element("thead", {}, head), element("tbody", {}, ...body));
}
