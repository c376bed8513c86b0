// Colours for code: comments, texts, numbers and the words that most languages share. A guess, never an error.

import { h } from "./dom.js";

const HASH = new Set("python py sh bash zsh shell console yaml yml toml ruby rb r perl make makefile dockerfile nix ini".split(" "));
const DASHES = new Set("sql lua haskell hs ada".split(" "));
const PLAIN = new Set(["", "text", "txt", "plain", "plaintext", "output", "markdown", "md", "diff"]);

const WORDS = new Set(`and as assert async await begin bool break case catch char class const continue def default defer del delete
do double elif else end enum except export extends extern false finally float fn for foreach from func function go if impl
implements import in include instanceof int interface is lambda let long loop match mod module mut namespace new nil None not
null of or package pass private protected pub public raise return select self short signed sizeof static string struct super
switch template then this throw throws trait True False true try type typedef typeof undefined union unsafe unsigned until use
using var virtual void when where while with yield create table into values update set join left right inner outer on group
order by limit insert`.split(/\s+/));

const TEXT = String.raw`"""[\s\S]*?(?:"""|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?`;
const REST = String.raw`|(?<number>\b(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?))|(?<word>[A-Za-z_$][\w$]*)`;

/** Text nodes and coloured spans that together are the text. */
export function highlight(text, language) {
  const name = language.toLowerCase();
  if (PLAIN.has(name)) return [text];
  const pieces = [];
  let end = 0;
  for (const match of text.matchAll(pattern(name))) {
    const kind = kindOf(match, name, text);
    if (!kind) continue;
    if (match.index > end) pieces.push(text.slice(end, match.index));
    pieces.push(h("span", { class: `hl-${kind}` }, match[0]));
    end = match.index + match[0].length;
  }
  pieces.push(text.slice(end));
  return pieces;
}

function kindOf({ 0: found, index, groups }, name, text) {
  if (groups.comment !== undefined) return "comment";
  if (groups.text !== undefined) return "text";
  if (groups.number !== undefined) return "number";
  if (WORDS.has(name === "sql" ? found.toLowerCase() : found)) return "word";
  return text[index + found.length] === "(" ? "call" : null;
}

function pattern(name) {
  let comment = String.raw`\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`;
  if (HASH.has(name)) comment = "#[^\\n]*";
  else if (DASHES.has(name)) comment = "--[^\\n]*";
  else if (["html", "xml", "svg"].includes(name)) comment = "<!--[\\s\\S]*?(?:-->|$)";
  const template = ["js", "javascript", "ts", "typescript", "jsx", "tsx", "go"].includes(name) ? "|`(?:\\\\.|[^`\\\\])*`?" : "";
  return new RegExp(`(?<comment>${comment})|(?<text>${TEXT}${template})${REST}`, "g");
}
