// The keyboard: everything on this page can be done without a mouse.

// Keyboards on glass have no Shift-Enter: there, Enter begins a line and the button sends.
export const touch = matchMedia("(hover: none) and (pointer: coarse)");

/** Whether a key means that the message is complete; not while Enter ends a word of an input method. */
export const sends = (event) =>
  event.key === "Enter" && !event.shiftKey && !event.altKey && !event.isComposing && !touch.matches;

/** `page`: what the keys act on, see app.js. */
export function listen(page) {
  const { prompt } = page;
  prompt.enterKeyHint = touch.matches ? "enter" : "send";

  prompt.addEventListener("keydown", (event) => {
    if (sends(event)) {
      event.preventDefault();
      page.send();
    } else if (event.key === "ArrowUp" && !event.isComposing && !prompt.value && !modified(event)) {
      if (page.editLast()) event.preventDefault();
    }
  });

  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") {
      if (page.sidebar.isOpen) page.sidebar.open(false);
      else if (page.isBusy()) page.halt();
    } else if (event.altKey && !event.ctrlKey && !event.metaKey) {
      // By place on the keyboard: with Alt, many layouts type something else.
      const act = { KeyN: page.begin, ArrowUp: () => page.step(-1), ArrowDown: () => page.step(1) }[event.code];
      if (!act) return;
      event.preventDefault();
      act();
    } else if (event.key.length === 1 && event.key !== " " && !event.ctrlKey && !event.metaKey && isReading(event.target)) {
      prompt.focus(); // and the letter goes there
    }
  });
}

const modified = (event) => event.shiftKey || event.altKey || event.ctrlKey || event.metaKey;

/** Whether the focus is on something that a letter means nothing to. */
const isReading = (target) => !target.closest("input, textarea, select, button, a, [contenteditable]");
