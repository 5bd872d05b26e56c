// The choice of a method (policy, pattern, selector) and its arguments, from what the server says there is.

import { element } from "./elements.js";

/** Text as the server would get it from a command line: 512 is a number, true a truth value, 25% a string. */
function valueOf(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

export class Choice {
  /**
   * @param {HTMLFieldSetElement} box holds a select, and a place for arguments; its data-field names the request's.
   * @param {string} named the key under which the method's name goes.
   * @param {string[]} apart arguments that the page shows itself.
   */
  constructor(box, named, apart = []) {
    this.field = box.dataset.field;
    this.named = named;
    this.apart = apart;
    this.select = box.querySelector("select");
    this.details = box.querySelector("details");
    this.place = box.querySelector(".arguments");
    this.allocators = {};
    this.select.addEventListener("change", () => this.show());
    this.place.addEventListener("change", ({ target }) => {
      if (!target.dataset.redraws) return;
      this.show();
      this.input(target.dataset.argument).focus(); // a new one, in the old one's place
    });
  }

  /** Take over what the server offers: the answer of its route. */
  offer(content, chosen) {
    this.methods = new Map(content.data.map((method) => [method.name, method]));
    this.allocators = content.allocators ?? {};
    const usable = content.data.filter((method, index) => index === 0 || content.available);
    this.select.replaceChildren(
      ...usable
        .filter((method) => method.enabled !== false)
        .map(({ name, title, unavailable_reason: reason }) =>
          element("option", { value: name, title, disabled: Boolean(reason), textContent: reason ? `${name} (not here)` : name }),
        ),
    );
    this.select.value = this.methods.has(chosen) ? chosen : content.data[0].name;
    this.show();
  }

  get method() {
    return this.methods?.get(this.select.value);
  }

  /** The method's arguments, those of the chosen allocators too, by name. */
  get schema() {
    const properties = { ...this.method.arguments.properties };
    for (const [field, parts] of Object.entries(this.allocators)) {
      const part = parts.find(({ name }) => name === this.input(field)?.value);
      Object.assign(properties, part?.arguments.properties);
    }
    return properties;
  }

  input(argument) {
    return this.place.querySelector(`[data-argument="${argument}"]`);
  }

  /** Draw the inputs of the chosen method; what was typed for another one stays where both take it. */
  show() {
    const typed = new Map([...this.place.querySelectorAll("[data-argument]")].map((input) => [input.dataset.argument, input.value]));
    const parts = this.select.selectedIndex > 0 ? Object.entries(this.allocators) : [];
    const rows = parts.map(([field, known]) => this.row(field, {
      enum: known.map(({ name }) => name), description: `Shares the budget over ${field === "heads" ? "a layer's heads" : field}.`,
      usual: "the policy's own", redraws: true,
    }));
    this.place.replaceChildren(...rows);
    this.fill(typed); // the chosen allocators have arguments too
    const shown = Object.entries(this.schema).filter(([argument]) => !this.apart.includes(argument));
    this.place.append(...shown.map(([argument, schema]) => this.row(argument, schema)));
    this.fill(typed);
    this.details.hidden = this.place.childElementCount === 0;
  }

  fill(typed) {
    for (const [argument, value] of typed) {
      const input = this.input(argument);
      if (input) input.value = value;
    }
  }

  row(argument, schema) {
    const id = `${this.field}-${argument}`;
    const usual = schema.usual ?? (schema.default === undefined ? "" : JSON.stringify(schema.default).replaceAll('"', ""));
    const values = schema.enum ?? (schema.type === "boolean" ? [true, false] : null);
    const input = values
      ? element("select", {}, element("option", { value: "", textContent: schema.usual ?? `${usual} (default)` }),
        ...values.map((value) => element("option", { value: String(value), textContent: String(value) })))
      : element("input", { placeholder: usual, autocomplete: "off", spellcheck: false });
    input.id = id;
    Object.assign(input.dataset, { argument, field: `${this.field}.${argument}`, ...(schema.redraws && { redraws: "yes" }) });
    input.setAttribute("aria-describedby", `${id}-hint ${id}-error`);
    const error = element("p", { className: "error", id: `${id}-error` });
    error.setAttribute("role", "alert");
    return element("div", { className: "field" },
      element("label", { htmlFor: id, textContent: argument }), input,
      element("p", { className: "hint", id: `${id}-hint`, textContent: schema.description ?? "" }), error);
  }

  /** The field of a request, with what was typed and nothing else. */
  words(more = {}) {
    const words = { [this.named]: this.select.value };
    for (const input of this.place.querySelectorAll("[data-argument]")) {
      if (input.value.trim()) words[input.dataset.argument] = valueOf(input.value.trim());
    }
    for (const [argument, text] of Object.entries(more)) {
      if (text.trim() && argument in this.schema) words[argument] = valueOf(text.trim());
    }
    return words;
  }
}
