// The sheet with what the person can set. Whatever is changed there is kept at once.

import { byId } from "./dom.js";
import * as store from "./store.js";

const NUMBERS = new Set(["temperature", "top_p", "top_k", "min_p", "repetition_penalty"]);

export class Settings {
  /** `changed` is called after every change. */
  constructor(changed) {
    this.values = store.settings();
    this.changed = changed;
    this.dialog = byId("settings");
    this.form = byId("settings-form");
    byId("settings-open").addEventListener("click", () => this.open());
    byId("defaults").addEventListener("click", () => this.#reset());
    this.form.addEventListener("input", (event) => this.#read(event.target));
    // A click on what lies behind the sheet.
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
    byId("key").value = store.key();
    this.#show();
  }

  open(field = null) {
    if (!this.dialog.open) this.dialog.showModal();
    if (field) byId(field).focus();
  }

  set(name, value) {
    this.values[name] = value;
    store.saveSettings(this.values);
  }

  #read(field) {
    if (field.id === "key") {
      store.saveKey(field.value.trim());
    } else if (field.name && field.checkValidity()) {
      this.set(field.name, NUMBERS.has(field.name) ? Number(field.value) : field.value);
    }
    this.#show(field);
    this.changed();
  }

  #show(typing = null) {
    for (const field of this.form.elements) {
      if (!(field.name in this.values)) continue;
      const value = this.values[field.name];
      if (field !== typing) field.value = field.name === "top_k" && !value ? "" : value;
      const output = this.form.querySelector(`output[data-of="${field.name}"]`);
      if (output) output.value = Number(value).toFixed(2);
    }
    const { theme } = this.values;
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  }

  #reset() {
    for (const name of [...NUMBERS, "max_tokens", "seed"]) this.values[name] = store.DEFAULTS[name];
    store.saveSettings(this.values);
    this.#show();
    this.changed();
  }
}
