// Errors in words, next to the field that they are about.

import { by } from "./elements.js";

const input = (field) => field && document.querySelector(`input[data-field="${field}"], select[data-field="${field}"]`);

/**
 * @param {string|null} field an input's id, or the request's field as the server names it; others go above the buttons.
 */
export function fieldError(field, message) {
  const found = by(field ?? "") ?? input(field) ?? input(field?.split(".").slice(0, 2).join("."));
  const place = by(`${found?.id}-error`) ?? by("form-error");
  place.textContent = message;
  if (!found) return;
  const closed = found.closest("details:not([open])");
  if (closed) closed.open = true;
  found.setAttribute("aria-invalid", true);
  found.focus();
}

export function forget() {
  for (const place of document.querySelectorAll("#ask .error")) place.textContent = "";
  for (const field of document.querySelectorAll('#ask [aria-invalid="true"]')) field.removeAttribute("aria-invalid");
}
