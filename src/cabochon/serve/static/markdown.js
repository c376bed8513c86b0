// Markdown to DOM nodes, and the growing text of an answer to a page that does not jump.

import { blocks } from "./blocks.js";
import { h, icon } from "./dom.js";
import { highlight } from "./highlight.js";
import { inline } from "./inline.js";

const MAX_DEPTH = 6;

/** The nodes of a text. */
export const render = (text, depth = 0) => blocks(text).map((block) => draw(block, depth));

/** Shows a text that grows at its end: blocks that stay the same keep their nodes, with focus, selection and scroll. */
export class LiveMarkdown {
  constructor(parent) {
    this.parent = parent;
    this.shown = []; // {block, node}
  }

  update(text) {
    const next = blocks(text);
    for (let i = 0; i < next.length; i++) {
      const old = this.shown[i];
      if (old?.block.source === next[i].source && old.block.kind === next[i].kind) continue;
      if (old && old.block.kind === "code" && next[i].kind === "code" && old.block.language === next[i].language) {
        fill(old.node, next[i]);
        this.shown[i] = { block: next[i], node: old.node };
        continue;
      }
      const node = draw(next[i], 0);
      if (old) old.node.replaceWith(node);
      else this.parent.append(node);
      this.shown[i] = { block: next[i], node };
    }
    for (const { node } of this.shown.splice(next.length)) node.remove();
  }

  /** What the blocks from one on say, up to those that may still change. */
  finished(from, all = false) {
    return this.shown.slice(from, all ? undefined : -1).map(({ node }) => spoken(node));
  }
}

function spoken(node) {
  if (node.tagName === "FIGURE") return `Code: ${node.querySelector("code").textContent}`;
  return node.innerText ?? node.textContent;
}

function draw(block, depth) {
  if (depth > MAX_DEPTH) return h("p", {}, block.source);
  switch (block.kind) {
    case "code": return codeBlock(block);
    // The page's own headings are of levels 1 and 2.
    case "heading": return withInline(h(`h${Math.min(block.level + 2, 6)}`), block.text);
    case "rule": return h("hr");
    case "quote": return h("blockquote", {}, ...render(block.text, depth + 1));
    case "list": return list(block, depth);
    case "table": return table(block);
    default: return withInline(h("p"), block.text);
  }
}

function withInline(node, text) {
  inline(node, text);
  return node;
}

function codeBlock(block) {
  const copy = h("button", { type: "button", class: "quiet", "data-copy": "code" }, icon("copy"), h("span", {}, "Copy"));
  const code = h("code");
  const figure = h("figure", { class: "code" },
    h("figcaption", {}, h("span", {}, block.language || "text"), copy),
    h("pre", { tabindex: "0", role: "region", "aria-label": `Code, ${block.language || "text"}` }, code));
  fill(figure, block);
  return figure;
}

function fill(figure, block) {
  figure.querySelector("code").replaceChildren(...highlight(block.text, block.language));
}

function list(block, depth) {
  const node = h(block.ordered ? "ol" : "ul", block.ordered && block.first !== 1 ? { start: block.first } : {});
  for (const item of block.items) {
    const task = /^\[([ xX])\] /.exec(item);
    const children = render(task ? item.slice(4) : item, depth + 1);
    const li = h("li", task ? { class: "task" } : {});
    if (task) li.append(h("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": "Task" }));
    for (const child of children) {
      if (child.tagName === "P" && !block.loose) li.append(...child.childNodes);
      else li.append(child);
    }
    node.append(li);
  }
  return node;
}

function table(block) {
  const row = (name, row) => h("tr", {}, ...row.map((text, column) =>
    withInline(h(name, { class: `align-${block.align[column]}`, scope: name === "th" ? "col" : null }), text)));
  return h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
    h("table", {}, h("thead", {}, row("th", block.head)), h("tbody", {}, ...block.rows.map((cells) => row("td", cells)))));
}
