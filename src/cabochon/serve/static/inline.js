// Markdown inside a paragraph, to DOM nodes. HTML in it is text like any other.
//
// Every search either moves forward or is remembered as vain, so that no input takes quadratic time.

import { h } from "./dom.js";

const ESCAPABLE = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;
const BARE_LINK = /https?:\/\/[^\s<>"'`]+/y;
const MARKS = { "**": "strong", "__": "strong", "~~": "s", "*": "em", "_": "em" };
const MAX_DEPTH = 8;
const MAX_LABEL = 400;

/** Appends the nodes of a text to a parent. */
export function inline(parent, text, depth = 0) {
  const vain = new Set();
  let plain = "";
  let i = 0;
  const flush = () => {
    if (plain) parent.append(plain);
    plain = "";
  };
  while (i < text.length) {
    const found = depth < MAX_DEPTH ? element(text, i, depth, vain) : null;
    if (found) {
      flush();
      if (found.node) parent.append(found.node);
      else plain = found.text;
      i = found.end;
    } else {
      plain += text[i++];
    }
  }
  flush();
}

/** The element that begins at a position, {node or text, end}, or null. */
function element(text, i, depth, vain) {
  const c = text[i];
  if (c === "\n") return { node: h("br"), end: i + 1 };
  if (c === "\\" && ESCAPABLE.test(text[i + 1] ?? "")) return { text: text[i + 1], end: i + 2 };
  if (c === "`") return codeSpan(text, i, vain);
  if (c === "*" || c === "_" || c === "~") return emphasis(text, i, depth, vain);
  if (c === "[" || (c === "!" && text[i + 1] === "[")) return link(text, i, depth);
  if (c === "<" || (c === "h" && !WORD.test(text[i - 1] ?? ""))) return bareLink(text, i);
  return null;
}

function codeSpan(text, i, vain) {
  let size = 1;
  while (text[i + size] === "`") size++;
  const fence = "`".repeat(size);
  if (vain.has(fence)) return { text: fence, end: i + size };
  let end = text.indexOf(fence, i + size);
  while (end >= 0 && text[end + size] === "`") {
    let after = end;
    while (text[after] === "`") after++;
    end = text.indexOf(fence, after);
  }
  if (end < 0) {
    vain.add(fence);
    return { text: fence, end: i + size };
  }
  const inner = text.slice(i + size, end).replaceAll("\n", " ");
  const padded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim();
  return { node: h("code", {}, padded ? inner.slice(1, -1) : inner), end: end + size };
}

function emphasis(text, i, depth, vain) {
  const double = text[i] === text[i + 1] ? text[i] + text[i] : "";
  const triple = double && text[i] === text[i + 2] && text[i] !== "~" && text[i] !== text[i + 3];
  return (triple && emphasized(text, i, text[i], depth, vain)) // slanted outside, bold inside
    || (double && emphasized(text, i, double, depth, vain))
    || (text[i] !== "~" && emphasized(text, i, text[i], depth, vain))
    || (double ? { text: double, end: i + 2 } : null);
}

function emphasized(text, i, mark, depth, vain) {
  const start = i + mark.length;
  if (vain.has(mark) || isSpace(text[start])) return null;
  if (mark[0] === "_" && WORD.test(text[i - 1] ?? "")) return null;
  const end = closing(text, start, mark);
  if (end < 0) {
    vain.add(mark);
    return null;
  }
  const node = h(MARKS[mark]);
  inline(node, text.slice(start, end), depth + 1);
  return { node, end: end + mark.length };
}

/** Where a mark closes: behind a character that is no space, outside of code. */
function closing(text, start, mark) {
  const opensAnother = mark.length === 1 && text[start] === mark; // the ** behind the * of ***
  for (let i = start + (opensAnother ? 2 : 1); i < text.length; i++) {
    if (text[i] === "\\") {
      i++;
    } else if (text[i] === "`") {
      const end = text.indexOf("`", i + 1);
      if (end >= 0 && end - i < MAX_LABEL) i = end;
    } else if (text.startsWith(mark, i) && !isSpace(text[i - 1])) {
      const single = mark.length === 1 && text[i + 1] === mark;
      const inWord = mark[0] === "_" && WORD.test(text[i + mark.length] ?? "");
      if (single) i++;
      else if (!inWord) return text[i + mark.length] === mark[0] && mark.length === 2 ? i + 1 : i;
    }
  }
  return -1;
}

/** [label](address) and ![label](address), which stays a link: the page shows nothing from outside. */
function link(text, i, depth) {
  const open = text[i] === "!" ? i + 1 : i;
  let level = 0;
  let close = open;
  for (; close < text.length && close - open < MAX_LABEL; close++) {
    if (text[close] === "\\") close++;
    else if (text[close] === "[") level++;
    else if (text[close] === "]" && --level === 0) break;
  }
  if (text[close] !== "]" || text[close + 1] !== "(") return null;
  const end = addressEnd(text, close + 2);
  if (end < 0) return null;
  const address = safeAddress(text.slice(close + 2, end).trim().split(/\s/)[0].replace(/^<(.*)>$/, "$1"));
  if (!address) return null;
  const node = anchor(address);
  inline(node, text.slice(open + 1, close) || address, Math.max(depth + 1, MAX_DEPTH - 2));
  return { node, end: end + 1 };
}

function addressEnd(text, start) {
  let level = 0;
  for (let i = start; i < text.length && i - start < 2000; i++) {
    if (text[i] === "\n") return -1;
    if (text[i] === "(") level++;
    else if (text[i] === ")" && level-- === 0) return i;
  }
  return -1;
}

function bareLink(text, i) {
  const angle = text[i] === "<";
  BARE_LINK.lastIndex = angle ? i + 1 : i;
  let address = BARE_LINK.exec(text)?.[0];
  if (!address) return null;
  if (angle && text[i + 1 + address.length] !== ">") return null;
  if (!angle) address = trimmed(address);
  if (!safeAddress(address)) return null;
  const node = anchor(address);
  node.append(address);
  return { node, end: i + address.length + (angle ? 2 : 0) };
}

/** Without the punctuation of the sentence around it. */
function trimmed(address) {
  let end = address.length;
  while (end > 0) {
    const c = address[end - 1];
    const unopened = c === ")" && !address.slice(0, end).includes("(");
    if (!".,;:!?*_~]".includes(c) && !unopened) break;
    end--;
  }
  return address.slice(0, end);
}

/** Only addresses that open a page or a letter: never javascript:, data: or a path on this server. */
function safeAddress(address) {
  try {
    return ["http:", "https:", "mailto:"].includes(new URL(address).protocol) ? address : null;
  } catch {
    return null;
  }
}

const anchor = (address) => h("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow", title: address });

const isSpace = (c) => c === undefined || /\s/.test(c);
