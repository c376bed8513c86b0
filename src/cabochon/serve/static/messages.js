// The messages of a conversation on the page. Elements of messages that stay are kept from one drawing to the next.

import { h, icon, iconButton } from "./dom.js";
import { sends } from "./keys.js";
import { LiveMarkdown } from "./markdown.js";
import { path, versions } from "./thread.js";

const CUT = "The answer was cut here: it had reached its longest length.";
const REMARKS = { length: CUT, stopped: "Stopped." };

export class Messages {
  /** `actions`: edit(node, text), regenerate(node), choose(node), retry(node), key(). */
  constructor(list, actions) {
    this.list = list;
    this.actions = actions;
    this.views = new Map();
    this.conversation = null;
  }

  /** Shows a conversation; `busy` is the answer that is on its way, if one is. */
  draw(conversation, busy) {
    if (conversation !== this.conversation) this.views.clear();
    this.conversation = conversation;
    const shown = path(conversation);
    const from = shown.at(-1)?.from ?? null;
    const items = [];
    for (const node of shown) {
      const view = this.views.get(node.id) ?? new MessageView(node, this.actions);
      this.views.set(node.id, view);
      view.draw(versions(conversation, node), node === busy);
      if (node.id === from) items.push(h("li", { class: "forgotten" }, "The model no longer sees what is above: the context is full."));
      items.push(view.element);
    }
    // Moving an element would take the focus out of it, so only what is new or gone is touched.
    for (const old of [...this.list.children]) if (!items.includes(old)) old.remove();
    items.forEach((item, i) => {
      if (this.list.children[i] !== item) this.list.insertBefore(item, this.list.children[i] ?? null);
    });
  }

  /** Draws the newest text of an answer; returns its view, or undefined where it is not shown. */
  grow(conversation, node) {
    if (conversation !== this.conversation) return undefined;
    const view = this.views.get(node.id);
    view?.drawText();
    return view;
  }

  /** What a message says, as it was written. */
  textOf(item) {
    return [...this.views.values()].find((view) => view.element === item)?.node.text ?? "";
  }

  /** Opens the newest message of the person for editing; false where there is none. */
  editLast() {
    const last = path(this.conversation).findLast((node) => node.role === "user");
    if (last) this.views.get(last.id).edit();
    return Boolean(last);
  }
}

class MessageView {
  constructor(node, actions) {
    this.node = node;
    this.act = actions;
    this.said = 0; // blocks that were read aloud
    this.text = h("div", { class: node.role === "model" ? "text prose" : "text", dir: "auto" });
    this.remarks = h("div");
    this.bar = h("div", { class: "actions" });
    this.element = h("li", { class: `message ${node.role}` },
      h("h2", { class: "unseen" }, node.role === "user" ? "You" : "Model"), this.text, this.remarks, this.bar);
    this.live = node.role === "model" ? new LiveMarkdown(this.text) : null;
  }

  draw(all, busy) {
    this.element.setAttribute("aria-busy", String(busy));
    this.busy = busy;
    this.drawText();
    this.remarks.replaceChildren(...(busy ? [] : this.#remarks()));
    const focused = this.bar.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    this.bar.replaceChildren(...this.#buttons(all));
    if (focused) (this.bar.querySelector(`[data-name="${focused}"]:enabled`) ?? this.bar.querySelector("button"))?.focus();
  }

  drawText() {
    const { text } = this.node;
    if (!this.live) {
      this.text.textContent = text;
      return;
    }
    const waiting = this.busy && !text.trim();
    if (waiting !== Boolean(this.wait)) {
      this.wait?.remove();
      this.wait = waiting ? h("span", { class: "wait" }, h("i"), h("i"), h("i")) : null;
      if (waiting) this.text.append(this.wait);
    }
    this.live.update(text);
  }

  /** What has not been read aloud yet, by whole blocks. */
  unsaid(all) {
    const blocks = this.live.finished(this.said, all);
    this.said += blocks.length;
    return blocks;
  }

  edit() {
    const area = h("textarea", { rows: "1", "aria-label": "Edit your message", dir: "auto" });
    area.value = this.node.text;
    const close = () => {
      editor.replaceWith(this.text);
      this.bar.hidden = false;
      this.bar.querySelector("[data-name=edit]")?.focus();
    };
    const send = () => {
      if (!area.value.trim()) return;
      close();
      this.act.edit(this.node, area.value);
    };
    area.addEventListener("keydown", (event) => {
      if (sends(event)) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape" && !event.isComposing) {
        event.preventDefault();
        event.stopPropagation();
        close();
        this.act.leave();
      }
    });
    const editor = h("div", { class: "editor" }, area, h("div", {},
      h("button", { type: "button", class: "plain", click: close }, "Cancel"),
      h("button", { type: "button", class: "chief", click: send }, "Send")));
    this.bar.hidden = true;
    this.text.replaceWith(editor);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
    this.element.scrollIntoView({ block: "nearest" });
  }

  #buttons(all) {
    const name = (value) => ({ "data-name": value });
    const buttons = [];
    if (this.node.role === "user") {
      buttons.push(iconButton("copy", "Copy this message", null, { ...name("copy"), "data-copy": "message" }),
        iconButton("edit", "Edit and send again", () => this.edit(), name("edit")));
    } else if (!this.busy) {
      buttons.push(iconButton("copy", "Copy this answer", null, { ...name("copy"), "data-copy": "message" }),
        iconButton("again", "Give another answer", () => this.act.regenerate(this.node), name("again")));
    }
    if (all.length > 1) buttons.push(this.#versions(all, name));
    if (this.node.stats && !this.busy) buttons.push(h("span", { class: "stats" }, statistics(this.node.stats)));
    return buttons;
  }

  #versions(all, name) {
    const place = all.indexOf(this.node);
    const what = this.node.role === "user" ? "message" : "answer";
    return h("span", { class: "versions", role: "group", "aria-label": `Versions of this ${what}` },
      iconButton("before", "Version before", () => this.act.choose(all[place - 1]), { disabled: place === 0, ...name("before") }),
      h("span", { "aria-label": `Version ${place + 1} of ${all.length}`, role: "img" }, `${place + 1}/${all.length}`),
      iconButton("after", "Version after", () => this.act.choose(all[place + 1]),
        { disabled: place === all.length - 1, ...name("after") }));
  }

  #remarks() {
    const { error, finish, status, retryAfter } = this.node;
    if (!error) {
      const text = REMARKS[finish] ?? (this.node.role === "model" && !this.node.text.trim() ? "The answer is empty." : null);
      return text ? [h("p", { class: "remark" }, text)] : [];
    }
    const wait = retryAfter ? ` It can be tried again in ${retryAfter} s.` : "";
    const button = status === 401
      ? h("button", { type: "button", class: "plain", click: () => this.act.key() }, "Enter a key")
      : h("button", { type: "button", class: "plain", click: () => this.act.regenerate(this.node) }, icon("again"), "Try again");
    return [h("p", { class: "remark wrong" }, error + wait), button];
  }
}

function statistics({ tokens, wait, speed }) {
  const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`];
  if (speed) parts.push(`${speed >= 10 ? Math.round(speed) : speed.toFixed(1)} per second`);
  if (wait) parts.push(`first after ${(wait / 1000).toFixed(wait < 1000 ? 2 : 1)} s`);
  return parts.join(" · ");
}
