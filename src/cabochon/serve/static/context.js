// How full the context is, counted by the server's own tokenizer.

import * as api from "./api.js";
import { byId } from "./dom.js";
import { path, toMessages, turns } from "./thread.js";

const PAUSE = 250; // milliseconds without typing before the count is asked for

export class Context {
  constructor() {
    this.timer = 0;
    this.controller = null;
    this.model = null;
  }

  /** Counts the conversation with what is being typed, soon; without a draft, what the newest answer came with is right. */
  count(conversation, draft, settings) {
    const shown = path(conversation);
    if (!draft.trim()) {
      this.show(shown.findLast((node) => node.used)?.used ?? (shown.length ? null : 0));
      return;
    }
    clearTimeout(this.timer);
    this.controller?.abort();
    const messages = toMessages(turns(shown), draft.trim(), settings.instructions);
    if (this.model?.context) this.timer = setTimeout(() => this.#ask(messages), PAUSE);
  }

  /** Shows a number that is known; null: none. */
  show(used) {
    clearTimeout(this.timer);
    this.controller?.abort();
    const context = this.model?.context;
    const meter = byId("meter");
    meter.hidden = used === null || !context;
    byId("count").textContent = used === null || !context ? "" : `${used.toLocaleString("en")} of ${context.toLocaleString("en")} tokens`;
    if (!meter.hidden) meter.value = Math.min(used / context, 1);
  }

  async #ask(messages) {
    this.controller = new AbortController();
    const { signal } = this.controller;
    try {
      const used = await api.countTokens(this.model.id, messages, signal);
      if (!signal.aborted) this.show(used);
    } catch (error) {
      // The count is a courtesy: whatever is wrong shows when the message is sent.
      if (error.name !== "AbortError") this.show(null);
    }
  }
}
