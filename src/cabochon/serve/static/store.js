// What this browser keeps: one entry for each conversation, one for the settings. Nothing leaves it.

import { checked } from "./thread.js";

const CONVERSATION = "cabochon.conversation.";
const SETTINGS = "cabochon.settings";
const KEY = "cabochon.key"; // only for as long as the tab is open

export const DEFAULTS = Object.freeze({ temperature: 0, top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1,
  max_tokens: "", seed: "", instructions: "", theme: "system", model: "" });

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** Newest first. */
export function conversations() {
  const found = [];
  for (let i = 0; i < localStorage.length; i++) {
    const name = localStorage.key(i);
    if (!name.startsWith(CONVERSATION)) continue;
    const conversation = checked(parsed(localStorage.getItem(name)));
    if (conversation) found.push(conversation);
  }
  return found.sort((a, b) => b.updated - a.updated);
}

export const read = (id) => checked(parsed(localStorage.getItem(CONVERSATION + id)));

/** False where the browser has no room left. */
export function save(conversation) {
  return write(CONVERSATION + conversation.id, JSON.stringify(conversation));
}

export const remove = (id) => localStorage.removeItem(CONVERSATION + id);

export function settings() {
  const stored = parsed(localStorage.getItem(SETTINGS)) ?? {};
  const known = Object.entries(DEFAULTS).map(([name, value]) =>
    [name, typeof stored[name] === "number" || typeof stored[name] === "string" ? stored[name] : value]);
  return Object.fromEntries(known);
}

export const saveSettings = (values) => write(SETTINGS, JSON.stringify(values));

export const draft = (id) => sessionStorage.getItem(`cabochon.draft.${id}`) ?? "";
export const saveDraft = (id, text) => {
  if (text) sessionStorage.setItem(`cabochon.draft.${id}`, text);
  else sessionStorage.removeItem(`cabochon.draft.${id}`);
};

export const key = () => sessionStorage.getItem(KEY) ?? "";
export const saveKey = (value) => sessionStorage.setItem(KEY, value);

/** Calls back with a conversation's id when another tab has changed or removed it. */
export function onOtherTab(changed) {
  addEventListener("storage", (event) => {
    if (event.key?.startsWith(CONVERSATION)) changed(event.key.slice(CONVERSATION.length));
  });
}

function write(name, text) {
  try {
    localStorage.setItem(name, text);
    return true;
  } catch {
    return false;
  }
}
