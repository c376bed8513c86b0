// Which models the server has, and the one that is asked.

import * as api from "./api.js";
import { byId } from "./dom.js";
import { notice } from "./speech.js";

const ASK_AGAIN = 3000; // milliseconds until a server that is not ready is asked again

export class Models {
  /** `taken` is called whenever another model is the one that is asked. */
  constructor(settings, taken) {
    this.settings = settings;
    this.taken = taken;
    this.known = [];
    this.current = null; // {id, context}
    this.timer = 0;
    this.select = byId("model");
    this.select.addEventListener("change", () => {
      settings.set("model", this.select.value);
      this.#take(this.select.value);
    });
    this.meet();
  }

  /** Asks the server for its models until it answers; where it wants a key first, the person is asked for it. */
  async meet() {
    clearTimeout(this.timer);
    try {
      this.known = await api.models();
    } catch (error) {
      if (error.status === 401) notice("This server asks for an API key.", "Enter a key", () => this.settings.open("key"));
      else this.timer = setTimeout(() => this.meet(), ASK_AGAIN);
      this.select.replaceChildren(new Option({ 401: "needs a key", 503: "getting ready" }[error.status] ?? "out of reach"));
      return;
    }
    this.select.replaceChildren(...this.known.map(({ id }) => new Option(id, id)));
    this.select.disabled = this.known.length < 2;
    const wanted = this.settings.values.model;
    this.#take(this.known.some(({ id }) => id === wanted) ? wanted : this.known[0]?.id);
  }

  #take(id) {
    this.current = this.known.find((model) => model.id === id) ?? null;
    if (!this.current) return;
    this.select.value = id;
    this.taken(this.current);
  }
}
