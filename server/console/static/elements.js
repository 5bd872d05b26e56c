// Small helpers for the page's elements.

export const by = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** A copy of a template's only child. */
export const copy = (id) => by(id).content.firstElementChild.cloneNode(true);

/** Say something to those who hear the page; only what is new is read out. */
export function announce(text) {
  by("status").textContent = text;
}
