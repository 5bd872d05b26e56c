// Requests to the server that this page comes from, its errors as words, and the key that it may want.

const ROOT = new URL("../", import.meta.url); // /console/api.js: a proxy's path in front of it stays
const KEPT = "longreach-api-key";

let key = sessionStorage.getItem(KEPT) ?? "";

export function setKey(value, keep) {
  key = value;
  if (keep && value) sessionStorage.setItem(KEPT, value);
  else sessionStorage.removeItem(KEPT);
}

export const hasKey = () => key !== "";

/** What went wrong, in words. `field`: of the request, where the server names it; `status`: 0 for the network. */
export class ApiError extends Error {
  constructor(message, { status = 0, field = null } = {}) {
    super(message);
    this.status = status;
    this.field = field;
  }
}

export const get = async (path) => (await call(path, {})).json();
export const post = async (path, body, signal) => (await call(path, posted(body, signal))).json();

/** The objects of an event stream, as they come. */
export async function* events(path, body, signal) {
  const answer = await call(path, posted(body, signal));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (let done = false; !done; ) {
      const part = await reader.read().catch(broken("The connection broke while the answer came."));
      done = part.done;
      const lines = (rest + (part.value ?? "")).split("\n"); // vLLM's events are a line each
      rest = done ? "" : lines.pop();
      for (const line of lines) {
        const data = line.startsWith("data:") ? line.slice(5).trim() : "";
        if (!data || data === "[DONE]") continue;
        const event = JSON.parse(data);
        if (event.error) throw wording(event, event.error.code ?? 500);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // what came before an error is enough
  }
}

const posted = (body, signal) => ({
  method: "POST", signal, body: JSON.stringify(body), headers: { "content-type": "application/json" },
});

async function call(path, options) {
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  const unreachable = "The server can't be reached. Does it still run, and is the network there?";
  const answer = await fetch(new URL(path, ROOT), { ...options, headers }).catch(broken(unreachable));
  if (!answer.ok) throw wording(await answer.json().catch(() => ({})), answer.status);
  return answer;
}

const broken = (message) => (error) => {
  throw error.name === "AbortError" ? error : new ApiError(message);
};

function wording(body, status) {
  if (status === 401) {
    return new ApiError(key ? "The server doesn't take this API key." : "The server asks for an API key.", { status });
  }
  const error = body.error?.message ? body.error : { message: body.detail ?? body.message ?? body.error };
  const message = typeof error.message === "string" ? error.message : `The server answered with status ${status}.`;
  return new ApiError(message, { status, field: error.param ?? null });
}
