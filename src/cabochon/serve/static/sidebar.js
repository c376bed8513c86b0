// The list of conversations. On a narrow page it is a drawer over the messages.

import { byId, h, iconButton } from "./dom.js";
import { titleOf } from "./thread.js";

export class Sidebar {
  /** `actions`: remove(conversation), renamed(conversation). */
  constructor(actions) {
    this.actions = actions;
    this.list = byId("conversations");
    byId("sidebar-open").addEventListener("click", () => this.open(true));
    byId("sidebar-close").addEventListener("click", () => this.open(false));
    byId("veil").addEventListener("click", () => this.open(false));
    // A drawer that is open while the page becomes wide would leave the messages out of reach.
    matchMedia("(max-width: 48rem)").addEventListener("change", () => this.open(false, false));
  }

  get isOpen() {
    return "sidebar" in byId("page").dataset;
  }

  open(open, focus = true) {
    if (open === this.isOpen) return;
    if (open) byId("page").dataset.sidebar = "";
    else delete byId("page").dataset.sidebar;
    byId("main").inert = open;
    byId("sidebar-open").setAttribute("aria-expanded", String(open));
    if (focus) byId(open ? "sidebar-close" : "sidebar-open").focus();
  }

  draw(conversations, current, running) {
    if (this.renaming) return;
    const focused = this.list.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    this.list.replaceChildren(...conversations.map((conversation) => this.#item(conversation, current, running)));
    if (focused) this.list.querySelector(`[data-name="${CSS.escape(focused)}"]`)?.focus();
  }

  #item(conversation, current, running) {
    const title = titleOf(conversation);
    const isCurrent = conversation.id === current.id;
    const isRunning = running.has(conversation.id);
    const link = h("a", { href: `#c=${conversation.id}`, title, "aria-current": isCurrent ? "page" : null,
      "data-name": conversation.id, click: () => this.open(false, false) }, title);
    const item = h("li", { "data-current": isCurrent, "data-running": isRunning }, link,
      iconButton("edit", `Rename ${title}`, () => this.#rename(item, conversation), { "data-name": `${conversation.id}-rename` }),
      iconButton("delete", `Delete ${title}`, () => this.actions.remove(conversation)));
    if (isRunning) link.append(h("span", { class: "unseen" }, " (is being answered)"));
    return item;
  }

  #rename(item, conversation) {
    const field = h("input", { "aria-label": "Name of the conversation", maxlength: "100" });
    field.value = titleOf(conversation);
    this.renaming = true;
    const end = (keep) => {
      if (!this.renaming) return;
      this.renaming = false;
      if (keep) conversation.title = field.value.trim();
      this.actions.renamed(conversation);
      this.list.querySelector(`[data-name="${CSS.escape(conversation.id)}-rename"]`)?.focus();
    };
    field.addEventListener("blur", () => end(true));
    field.addEventListener("keydown", (event) => {
      if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return;
      event.preventDefault();
      event.stopPropagation();
      end(event.key === "Enter");
    });
    item.replaceChildren(field);
    field.focus();
    field.select();
  }
}
