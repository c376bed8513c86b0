// From a question to its answer: what is sent, what comes back, and what is written down about it.

import * as api from "./api.js";
import { add, choose, path, toMessages, turns, versions } from "./thread.js";

// Where the likeliest token is always taken, another answer would be the same one.
const REGENERATION_TEMPERATURE = 0.8;

/** Answers on their way: conversation id to {node, controller}. They go on while another conversation is shown. */
export const running = new Map();

export const stop = (conversation) => running.get(conversation.id)?.controller.abort();

/**
 * Asks the model to answer a message, as another version if it has answered before. `grew` and `ended` are called
 * with the conversation and the answer. Nothing is raised: a failure is part of the answer.
 */
export async function answer(conversation, question, { model, settings, grew, ended }) {
  const shown = path(conversation);
  const before = shown.slice(0, shown.indexOf(question));
  const node = empty(conversation, question) ?? add(conversation, question, "model", "");
  const attempt = versions(conversation, node).length - 1;
  const controller = new AbortController();
  running.set(conversation.id, { node, controller });
  grew(conversation, node);
  try {
    const prompt = await fit(turns(before), question, { model, settings, signal: controller.signal });
    if (prompt.first !== before[0] && before.length) node.from = prompt.first.id;
    const request = { model: model.id, messages: prompt.messages, ...sampling(settings, attempt, prompt.room) };
    await receive(conversation, node, request, { controller, grew, used: prompt.used });
  } catch (error) {
    if (error.name === "AbortError") node.finish = "stopped";
    else note(node, error);
  }
  // An edited question may already be answered in this one's place.
  if (running.get(conversation.id)?.node === node) running.delete(conversation.id);
  conversation.updated = Date.now();
  ended(conversation, node);
}

/** An answer to the question that came to nothing, ready to be tried again. */
function empty(conversation, question) {
  const node = conversation.nodes.find((other) => other.parent === question.id && !other.text.trim());
  if (!node) return null;
  for (const field of ["error", "status", "retryAfter", "finish", "stats", "used", "from"]) delete node[field];
  node.text = "";
  choose(conversation, node);
  return node;
}

async function receive(conversation, node, request, { controller, grew, used }) {
  const started = performance.now();
  let first = null;
  let tokens = 0;
  let last = started;
  const write = () => {
    node.stats = { tokens, wait: (first ?? last) - started, speed: first === null || last === first ? null
      : ((tokens - 1) * 1000) / (last - first) };
    if (used !== null) node.used = used + tokens;
  };
  for await (const { text, finish, usage } of api.chat(request, controller.signal)) {
    if (text) {
      last = performance.now();
      first ??= last;
      tokens++; // a server may send several at once: usage, at the end, is exact
      node.text += text;
    }
    if (finish) node.finish = finish;
    if (usage) {
      tokens = usage.completion_tokens;
      used = usage.prompt_tokens;
    }
    write();
    if (text) grew(conversation, node);
  }
}

function note(node, error) {
  node.error = error.message;
  node.status = error.status ?? 0;
  if (error.retryAfter) node.retryAfter = error.retryAfter;
  if (!(error instanceof api.Failure)) console.error(error);
}

/**
 * The newest turns that leave the answer a fair length: {messages, first, used, room}. `first` is the first message
 * that the model sees, `used` and `room` are tokens, null where the server does not count.
 */
async function fit(complete, question, { model, settings, signal }) {
  const from = (dropped) => {
    const kept = complete.slice(dropped);
    return { first: kept[0]?.[0] ?? question, messages: toMessages(kept, question.text, settings.instructions) };
  };
  const count = async (dropped) => {
    const used = await api.countTokens(model.id, from(dropped).messages, signal);
    return { ...from(dropped), used, room: model.context - used };
  };
  if (!model.context) return { ...from(0), used: null, room: null };
  const most = model.context - Math.min(Number(settings.max_tokens) || model.context, Math.floor(model.context / 4));
  let fitting = await uncounted(count(0), from(0));
  if (fitting.used === null || fitting.used <= most) return fitting;
  // Every turn takes tokens, so the fewest to leave out are found by halving.
  let low = 1;
  let high = complete.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((await count(middle)).used <= most) high = middle;
    else low = middle + 1;
  }
  fitting = await count(Math.min(low, complete.length));
  if (fitting.room >= 1) return fitting;
  throw new api.Failure(`The message is too long: it takes ${fitting.used} tokens, and the context holds `
    + `${model.context}. Shorten it, or send it in parts.`, 400);
}

/** Other servers have no /tokenize: then everything is sent, and the server says whether it fits. */
async function uncounted(counted, instead) {
  try {
    return await counted;
  } catch (error) {
    if (error.status === 404 || error.status === 405) return { ...instead, used: null, room: null };
    throw error;
  }
}

/** The request's sampling fields. What is as OpenAI's interface has it anyway is left out. */
function sampling(settings, attempt, room) {
  const { temperature, top_p, top_k, min_p, repetition_penalty } = settings;
  const limits = [Number(settings.max_tokens), room].filter((limit) => limit > 0);
  const fields = { temperature: attempt ? Math.max(temperature, REGENERATION_TEMPERATURE) : temperature };
  if (top_p !== 1) fields.top_p = top_p;
  if (top_k > 0) fields.top_k = top_k;
  if (min_p > 0) fields.min_p = min_p;
  if (repetition_penalty !== 1) fields.repetition_penalty = repetition_penalty;
  if (limits.length) fields.max_tokens = Math.min(...limits);
  if (settings.seed !== "") fields.seed = Number(settings.seed) + attempt;
  return fields;
}
