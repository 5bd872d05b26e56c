// The page: what the server offers, the form, and what happens when it is sent.

import { get, hasKey, post, setKey } from "./api.js";
import { Choice } from "./choices.js";
import { Conversation } from "./conversation.js";
import { announce, by, element } from "./elements.js";
import { fieldError, forget } from "./errors.js";
import { whole } from "./figures.js";
import { HeatMap } from "./heatmap.js";

const box = (field) => document.querySelector(`fieldset[data-field="${field}"]`);
const policy = new Choice(box("kv_cache"), "policy", ["budget"]);
const pattern = new Choice(box("prefill_attention"), "pattern");
const selector = new Choice(box("decode_attention"), "selector");
const map = new HeatMap();
let conversation = new Conversation("");
let running = null;

// What the server offers

async function connect() {
  try {
    const routes = ["v1/models", "v1/kv/policies", "v1/prefill/patterns", "v1/decode/selectors"];
    const [models, policies, patterns, selectors] = await Promise.all(routes.map(get));
    by("model").replaceChildren(...models.data.map(({ id }) => element("option", { value: id, textContent: id })));
    const own = policies.default.policy;
    policy.offer(policies, own === "none" && policies.available ? "snapkv" : own);
    by("budget").value ||= policies.default.budget ?? "25%";
    pattern.offer(patterns, patterns.default.pattern);
    selector.offer(selectors, selectors.default.selector);
    const more = selectors.data.length - by("selector").length;
    by("selector-hint").textContent = more && selectors.available ? `${more} more with --decode-selectors.` : "";
    showBudget();
    const length = models.data[0].max_model_len;
    by("server").textContent = `${models.data[0].id}, ${whole(length)} tokens at most`;
    by("server").dataset.ready = "";
    by("send").disabled = false;
    keyPanel(false);
    return true;
  } catch (error) {
    by("send").disabled = true;
    by("server").textContent = error.message;
    if (error.status === 401) {
      keyPanel(true);
      by("key-error").textContent = hasKey() ? error.message : "";
      by("key").setAttribute("aria-invalid", hasKey());
      by("key").focus();
    }
    return false;
  }
}

function keyPanel(open) {
  by("key-panel").hidden = !open;
  by("key-button").setAttribute("aria-expanded", open);
}

by("key-button").addEventListener("click", () => {
  keyPanel(by("key-panel").hidden);
  if (!by("key-panel").hidden) by("key").focus();
});

by("key-panel").addEventListener("submit", async (event) => {
  event.preventDefault();
  setKey(by("key").value.trim(), by("key-keep").checked);
  if (await connect()) {
    by("key").removeAttribute("aria-invalid");
    by("key").value = by("key-error").textContent = "";
    by("document").focus();
  }
});

// The document

async function open(file) {
  forget();
  if (!file) return;
  try {
    by("document").value = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    await count();
  } catch (error) {
    fieldError("document", `${file.name} can't be opened: it is no text in UTF-8.`);
  }
}

/** Say how long the document is, in the model's tokens where the server tells. */
async function count() {
  const prompt = by("document").value;
  const words = prompt ? `${whole(prompt.length)} characters` : "No document.";
  by("document-count").textContent = words;
  if (!prompt.trim() || !by("model").value) return;
  try {
    const { count: tokens, max_model_len: most } = await post("tokenize", { model: by("model").value, prompt });
    if (by("document").value !== prompt) return;
    by("document-count").textContent = `${words}, ${whole(tokens)} tokens of ${whole(most)}`;
  } catch {
    // Without it the page works all the same: the server refuses what is too long, and says so.
  }
}

by("file").addEventListener("change", () => open(by("file").files[0]));
by("document").addEventListener("change", count);
by("document").addEventListener("drop", (event) => {
  if (!event.dataTransfer.files.length) return; // text drops as usual
  event.preventDefault();
  open(event.dataTransfer.files[0]);
});

// The question

function showBudget() {
  const shown = "budget" in policy.schema;
  by("budget-field").hidden = by("budget-hint").hidden = !shown;
  if (shown) by("budget").placeholder = policy.schema.budget.default;
}
by("policy").addEventListener("change", showBudget);

function wish() {
  const kv = policy.words({ budget: by("budget").value });
  const others = [pattern.words(), selector.words()];
  const named = [[kv.policy, kv.budget], [others[0].pattern], [others[1].selector]];
  const parts = named.filter(([name]) => name !== "none" && name !== "dense").map((part) => part.filter(Boolean).join(" "));
  const number = (id) => (by(id).value.trim() === "" ? undefined : Number(by(id).value));
  return {
    question: by("question").value.trim(),
    words: {
      kv_cache: { ...kv, ...(kv.policy !== "none" && { report: "positions" }) },
      prefill_attention: others[0],
      decode_attention: others[1],
    },
    name: parts.join(", ") || "none",
    options: { model: by("model").value, max_tokens: number("max-tokens"), temperature: number("temperature") },
    dense: by("dense").value,
  };
}

function mistake(asked) {
  if (!asked.question) return ["question", "Ask something."];
  const { max_tokens: most, temperature } = asked.options;
  if (most !== undefined && !(Number.isInteger(most) && most > 0)) return ["max-tokens", "Tokens: a whole number above 0."];
  if (Number.isNaN(temperature)) return ["temperature", "Temperature: a number, such as 0 or 0.7."];
  return null;
}

by("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  forget();
  const asked = wish();
  const wrong = mistake(asked);
  if (wrong) return fieldError(...wrong);
  if (by("document").value !== conversation.document) conversation = new Conversation(by("document").value);
  running = new AbortController();
  busy(true);
  map.hide();
  try {
    await conversation.ask(asked, running.signal, (answer, messages) => showKept(answer, messages, asked));
  } catch (error) {
    if (error.name === "AbortError") announce("Stopped.");
    else tell(error);
  } finally {
    running.abort(); // the other side, where one has failed
    running = null;
    busy(false);
  }
});

function showKept({ usage }, messages, { options, words }) {
  const kv = usage?.kv_cache;
  if (kv?.kept_positions) return map.show(kv, { model: options.model, messages });
  if (kv?.not_compressed) return map.explain(`Nothing was dropped: ${kv.not_compressed}.`);
  if (words.kv_cache.policy === "none") return map.explain("The policy none keeps every token.");
  return map.explain("Nothing was dropped: the budget isn't below the prompt, or the answer ended with its first token.");
}

function tell(error) {
  if (error.status === 401) connect();
  fieldError(error.field, error.message);
}

function busy(on) {
  by("send").disabled = on;
  by("stop").disabled = !on;
  const next = on ? by("stop") : by("send");
  if ([document.body, by("send"), by("stop")].includes(document.activeElement)) next.focus({ preventScroll: true });
}

by("stop").addEventListener("click", () => running?.abort());
by("new").addEventListener("click", () => {
  running?.abort();
  conversation = new Conversation(by("document").value);
  map.hide();
  forget();
  by("question").focus();
  announce("A new conversation.");
});

by("send").disabled = true;
connect().then((ready) => ready && count());
