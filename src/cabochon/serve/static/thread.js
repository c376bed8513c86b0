// A conversation as a tree: whoever edits a message or asks for another answer makes a sibling, and nothing is lost.
//
// Messages lie in one array and name each other by position. `chosen` of a message is the one that follows it;
// `chosen` of the conversation is the first one. Everything here is plain data that survives JSON.

export function newConversation() {
  const now = Date.now();
  return { id: crypto.randomUUID?.() ?? `${now}-${Math.random().toString(36).slice(2)}`,
    title: "", created: now, updated: now, chosen: null, nodes: [] };
}

/** The messages that are shown, first to last. */
export function path(conversation) {
  const shown = [];
  let next = conversation.chosen;
  while (next !== null && shown.length <= conversation.nodes.length) {
    const node = conversation.nodes[next];
    shown.push(node);
    next = node.chosen;
  }
  return shown;
}

/** Appends a message behind another one, or at the start where `parent` is null, and shows it. */
export function add(conversation, parent, role, text) {
  const node = { id: conversation.nodes.length, parent: parent?.id ?? null, chosen: null, role, text };
  conversation.nodes.push(node);
  choose(conversation, node);
  conversation.updated = Date.now();
  return node;
}

/** The versions of a message, itself included. */
export const versions = (conversation, node) => conversation.nodes.filter((other) => other.parent === node.parent);

export function choose(conversation, node) {
  (node.parent === null ? conversation : conversation.nodes[node.parent]).chosen = node.id;
}

export const parentOf = (conversation, node) => (node.parent === null ? null : conversation.nodes[node.parent]);

export function titleOf(conversation) {
  const first = conversation.nodes[conversation.chosen]?.text.trim().split("\n")[0] ?? "";
  return conversation.title || (first.length > 60 ? `${first.slice(0, 59)}…` : first) || "New conversation";
}

/**
 * What the model is sent: complete turns, then the question. A question that got no answer is left out, since
 * Gemma's turns alternate. Instructions go before the first message, as Gemma 2 has no system role.
 */
export function turns(shown) {
  const complete = [];
  for (let i = 0; i + 1 < shown.length; i += 2) {
    if (shown[i + 1].text.trim()) complete.push([shown[i], shown[i + 1]]);
  }
  return complete;
}

export function toMessages(complete, question, instructions) {
  const messages = complete.flatMap(([asked, answered]) => [
    { role: "user", content: asked.text }, { role: "assistant", content: answered.text }]);
  if (question) messages.push({ role: "user", content: question });
  if (instructions.trim() && messages.length) {
    messages[0] = { role: "user", content: `${instructions.trim()}\n\n${messages[0].content.trim()}` };
  }
  return messages;
}

/** A conversation read from storage, or null: what lies there may come from another version, or be damaged. */
export function checked(value) {
  const isText = (x) => typeof x === "string";
  if (!value || !isText(value.id) || !isText(value.title) || !Array.isArray(value.nodes)) return null;
  const isLink = (x) => x === null || (Number.isInteger(x) && x >= 0 && x < value.nodes.length);
  const sound = value.nodes.every((node, i) => node && node.id === i && isText(node.text)
    && (node.role === "user" || node.role === "model")
    && isLink(node.parent) && (node.parent === null || node.parent < i)
    && isLink(node.chosen) && (node.chosen === null || value.nodes[node.chosen]?.parent === i));
  const starts = isLink(value.chosen) && (value.chosen === null || value.nodes[value.chosen]?.parent === null);
  return sound && starts && Number.isFinite(value.updated) ? value : null;
}
