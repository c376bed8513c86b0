// The chat page: ties the conversations, the messages and the keyboard together.

import { answer, running, stop } from "./answer.js";
import { Context } from "./context.js";
import { byId, copyText } from "./dom.js";
import { listen, touch } from "./keys.js";
import { Messages } from "./messages.js";
import { Models } from "./models.js";
import { Follow } from "./scroll.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { notice, say } from "./speech.js";
import * as store from "./store.js";
import { add, choose, newConversation, parentOf, path, titleOf } from "./thread.js";

const SAVE_EVERY = 1000; // milliseconds, while an answer streams in

const prompt = byId("prompt");
const context = new Context();
const settings = new Settings(count);
const known = new Map(store.conversations().map((conversation) => [conversation.id, settled(conversation)]));
const sidebar = new Sidebar({ remove, renamed: keep });
const messages = new Messages(byId("messages"), { edit, regenerate, choose: show, leave: toPrompt,
  key: () => settings.open("key") });
const follow = new Follow(byId("scroller"), byId("messages"), byId("to-end"));

let current = newConversation();
let frame = 0;
let saved = 0;
let leaving = 0;
let impatient = false; // Enter was pressed before there was a model

// The page as it is

/** The place to type at; on glass that would bring up a keyboard that nobody asked for. */
function toPrompt() {
  if (!touch.matches) prompt.focus();
}

function draw() {
  const title = titleOf(current);
  const busy = running.get(current.id)?.node ?? null;
  messages.draw(current, busy);
  byId("empty").hidden = current.nodes.length > 0;
  byId("title").textContent = title;
  document.title = current.nodes.length ? `${title} · cabochon` : "cabochon";
  byId("stop").hidden = !busy;
  byId("send").hidden = Boolean(busy);
  drawSidebar();
  drawSend();
}

function drawSidebar() {
  const all = [...known.values()].sort((a, b) => b.updated - a.updated);
  sidebar.draw(all, current, running);
}

function drawSend() {
  byId("send").disabled = !prompt.value.trim();
  // Browsers without `field-sizing` need to be told the height.
  if (!CSS.supports("field-sizing", "content")) {
    prompt.style.height = "auto";
    prompt.style.height = `${prompt.scrollHeight}px`;
  }
}

function count() {
  context.count(current, prompt.value, settings.values);
}

function open(id) {
  if (current.id !== id) {
    current = known.get(id) ?? newConversation();
    prompt.value = store.draft(known.has(id) ? id : "new");
    follow.following = true;
  }
  draw();
  follow.toEnd();
  count();
  if (!sidebar.isOpen && !settings.dialog.open) toPrompt();
}

const fromAddress = () => open(/^#c=(.+)$/.exec(location.hash)?.[1] ?? current.id);

function begin() {
  sidebar.open(false, false);
  current = newConversation();
  history.pushState(null, "", "#new");
  open(null);
  toPrompt();
}

/** The conversation above or below in the list. */
function step(by) {
  const links = [...byId("conversations").querySelectorAll("a")];
  const place = links.findIndex((link) => link.hasAttribute("aria-current"));
  links[place < 0 ? 0 : place + by]?.click();
}

// Asking and answering

function send() {
  const text = prompt.value.trim();
  if (!text) return;
  if (!models.current) {
    impatient = true;
    notice("The server is not ready yet. The message is sent when it is.");
    return;
  }
  if (running.has(current.id)) {
    say("The answer is still being written. Escape stops it.");
    return;
  }
  store.saveDraft(known.has(current.id) ? current.id : "new", "");
  prompt.value = "";
  ask(add(current, path(current).at(-1) ?? null, "user", text));
}

function ask(question) {
  if (!known.has(current.id)) {
    known.set(current.id, current);
    history.replaceState(null, "", `#c=${current.id}`);
  }
  answer(current, question, { model: models.current, settings: { ...settings.values }, grew, ended });
  keep(current);
  follow.toEnd();
}

function edit(node, text) {
  stop(current);
  toPrompt();
  if (!models.current) {
    prompt.value = text;
    notice("The server is not ready yet. Your text is in the message box.");
    return;
  }
  ask(add(current, parentOf(current, node), "user", text.trim()));
}

function regenerate(node) {
  if (running.has(current.id) || !models.current) return;
  toPrompt();
  ask(parentOf(current, node));
}

function show(node) {
  choose(current, node);
  keep(current);
  count();
}

function grew(conversation, node) {
  if (Date.now() - saved > SAVE_EVERY) {
    store.save(conversation);
    saved = Date.now();
  }
  if (frame || conversation !== current) return;
  frame = requestAnimationFrame(() => {
    frame = 0;
    speak(messages.grow(conversation, node), false);
    if (conversation === current && node.used) context.show(node.used);
  });
}

function ended(conversation, node) {
  if (!known.has(conversation.id)) return; // deleted meanwhile
  if (node.status === 0 && Date.now() - leaving < 2000) {
    // Browsers end connections before they say that the page is left.
    delete node.error;
    node.finish = "stopped";
  }
  keep(conversation);
  if (conversation === current) {
    speak(messages.grow(conversation, node), true);
    if (node.error) say(`Error: ${node.error}`);
    else if (node.finish === "stopped") say("Stopped.");
    count();
  } else {
    notice(`Answered: ${titleOf(conversation)}`, "Show", () => (location.hash = `c=${conversation.id}`));
  }
}

/** Reads aloud the blocks that have come to their end. */
function speak(view, all) {
  for (const block of view?.unsaid(all) ?? []) say(block);
}

function halt() {
  stop(current);
  toPrompt();
}

// What is kept

function keep(conversation) {
  if (known.has(conversation.id) && !store.save(conversation)) {
    notice("This browser has no room left for conversations. Delete some, or this one will be lost.");
  }
  draw();
}

function remove(conversation) {
  stop(conversation);
  known.delete(conversation.id);
  store.remove(conversation.id);
  if (conversation === current) begin();
  else draw();
  notice(`Deleted: ${titleOf(conversation)}`, "Undo", () => {
    known.set(conversation.id, conversation);
    store.save(conversation);
    location.hash = `c=${conversation.id}`;
  });
}

/** An answer that was on its way when the page was left is one that was stopped. */
function settled(conversation) {
  for (const node of conversation.nodes) {
    if (node.role === "model" && !node.error) node.finish ??= "stopped";
  }
  return conversation;
}

function otherTab(id) {
  if (running.has(id)) return;
  const conversation = store.read(id);
  if (conversation) known.set(id, conversation);
  else known.delete(id);
  if (current.id === id && conversation) current = conversation;
  draw();
}

/** Called when the server is ready, and when another model is chosen. */
function met(model) {
  context.model = model;
  count();
  if (!impatient) return;
  impatient = false;
  byId("notice").replaceChildren();
  send();
}

// Events

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("input", () => {
  store.saveDraft(known.has(current.id) ? current.id : "new", prompt.value);
  drawSend();
  count();
});
byId("stop").addEventListener("click", halt);
byId("new").addEventListener("click", begin);
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  prompt.focus();
});
byId("settings").addEventListener("close", () => {
  if (!models.current) models.meet();
  toPrompt();
});
byId("messages").addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const item = button.closest("li.message");
  const code = button.dataset.copy === "code";
  await copyText(code ? button.closest("figure").querySelector("code").textContent : messages.textOf(item));
  say("Copied.");
  button.dataset.done = "";
  setTimeout(() => delete button.dataset.done, 1500);
});
listen({ send, halt, begin, step, prompt, isBusy: () => running.has(current.id), editLast: () => messages.editLast(), sidebar });
addEventListener("hashchange", fromAddress);
addEventListener("beforeunload", () => (leaving = Date.now()));
addEventListener("pagehide", () => {
  for (const [id, { node }] of running) {
    node.finish = "stopped";
    store.save(known.get(id));
    stop(known.get(id));
  }
});
store.onOtherTab(otherTab);

fromAddress();
if (!current.nodes.length) prompt.value = store.draft("new");
drawSend();
const models = new Models(settings, met);
