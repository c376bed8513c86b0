// What is said to those who listen to the page, and the short notices at its foot.

import { byId, h } from "./dom.js";

const SECONDS = 8;
let timer = 0;

/** Says a text through the screen reader, behind what it is saying now. */
export function say(text) {
  const announcer = byId("announcer");
  announcer.append(h("p", {}, text));
  while (announcer.children.length > 12) announcer.firstChild.remove();
}

/** Shows a notice for some seconds, with a button if there is something to do about it. */
export function notice(text, label = null, act = null) {
  const box = byId("notice");
  clearTimeout(timer);
  box.replaceChildren(h("span", {}, text));
  if (label) {
    box.append(h("button", { type: "button", click: () => {
      box.replaceChildren();
      act();
    } }, label));
  }
  // Whoever is on its way to the button keeps it.
  const end = () => {
    if (box.matches(":hover") || box.contains(document.activeElement)) timer = setTimeout(end, 1000);
    else box.replaceChildren();
  };
  timer = setTimeout(end, SECONDS * 1000);
}
