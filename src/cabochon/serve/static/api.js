// What the page asks of the server. Addresses are relative, so that the page also works under a path of a proxy.

import { eventData } from "./sse.js";
import * as store from "./store.js";

/** What went wrong, in words for the person; `status` is 0 where no answer came. */
export class Failure extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

async function call(path, { body, signal } = {}) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if (store.key()) headers.Authorization = `Bearer ${store.key()}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, signal, cache: "no-store",
      body: body ? JSON.stringify(body) : undefined });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const { status } = response;
  let message = "";
  try {
    const { error } = await response.json();
    message = typeof error === "string" ? error : error.message;
  } catch {
    // Not ours: perhaps a proxy's page.
  }
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  return new Failure(message || `The server answered with status ${status}.`, status, retryAfter);
}

/** [{id, context}]; `context` is null where the server does not say it. */
export async function models() {
  const { data } = await (await call("v1/models")).json();
  return data.map((model) => ({ id: model.id, context: model.max_model_len ?? null }));
}

/** Tokens that messages, the last of which is the person's, take with what opens the answer. */
export async function countTokens(model, messages, signal) {
  const { count } = await (await call("tokenize", { body: { model, messages }, signal })).json();
  return count;
}

/** Yields {text, finish, usage}, each where it is there. Raises `Failure` where the answer breaks off. */
export async function* chat(request, signal) {
  const body = { ...request, stream: true, stream_options: { include_usage: true } };
  const response = await call("v1/chat/completions", { body, signal });
  let complete = false;
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") {
        complete = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Failure(chunk.error.message, response.status);
      const choice = chunk.choices?.[0];
      yield { text: choice?.delta?.content ?? "", finish: choice?.finish_reason ?? null, usage: chunk.usage ?? null };
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Failure) throw error;
    throw new Failure("The connection broke off.");
  }
  if (!complete) throw new Failure("The answer broke off.");
}
