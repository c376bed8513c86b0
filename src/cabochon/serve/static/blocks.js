// Markdown cut into blocks: plain data, no DOM. What models write, not all of CommonMark.

const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4})(?=\S)|[ \t]*$| +)/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const QUOTE = /^ {0,3}> ?/;
const CELL_RULE = /^:?-+:?$/;

/**
 * The blocks of a text: {kind, source, ...}. `source` is the text that made it, so equal sources look equal:
 * while an answer streams in, only blocks whose source has changed are drawn again.
 */
export function blocks(text) {
  const lines = text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n");
  const found = [];
  let i = 0;
  while (i < lines.length) {
    if (!lines[i].trim()) {
      i++;
      continue;
    }
    const [block, end] = read(lines, i);
    found.push({ ...block, source: lines.slice(i, end).join("\n") });
    i = end;
  }
  return found;
}

function read(lines, i) {
  const line = lines[i];
  if (FENCE.test(line)) return code(lines, i);
  if (HEADING.test(line)) return [heading(line), i + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, i + 1];
  if (QUOTE.test(line)) return quote(lines, i);
  if (ITEM.test(line)) return list(lines, i);
  if (isTable(lines, i)) return table(lines, i);
  return paragraph(lines, i);
}

function code(lines, start) {
  const [, indent, fence, info] = FENCE.exec(lines[start]);
  const body = [];
  let i = start + 1;
  for (; i < lines.length; i++) {
    const end = FENCE.exec(lines[i]);
    if (end && end[2][0] === fence[0] && end[2].length >= fence.length && !end[3].trim()) break;
    let skip = 0;
    while (skip < indent.length && lines[i][skip] === " ") skip++;
    body.push(lines[i].slice(skip));
  }
  const closed = i < lines.length;
  return [{ kind: "code", language: info.trim().split(/\s/)[0].slice(0, 30), text: body.join("\n") },
    closed ? i + 1 : i];
}

function heading(line) {
  const level = HEADING.exec(line)[1].length;
  let text = line.trim().slice(level).trim();
  let end = text.length;
  while (text[end - 1] === "#") end--;
  if (end === 0 || text[end - 1] === " ") text = text.slice(0, end).trimEnd();
  return { kind: "heading", level, text };
}

function quote(lines, start) {
  let i = start;
  while (i < lines.length && QUOTE.test(lines[i])) i++;
  return [{ kind: "quote", text: lines.slice(start, i).map((line) => line.replace(QUOTE, "")).join("\n") }, i];
}

function list(lines, start) {
  const kindOf = (marker) => (/\d/.test(marker) ? marker.at(-1) : marker);
  const marker = ITEM.exec(lines[start])[2];
  const items = [];
  let loose = false;
  let blank = false;
  let indent = 0;
  let i = start;
  for (; i < lines.length; i++) {
    const line = lines[i];
    if (!line.trim()) {
      blank = true;
      items.at(-1).push("");
      continue;
    }
    const depth = line.length - line.trimStart().length;
    const item = ITEM.exec(line);
    if (items.length && depth >= indent) {
      loose ||= blank && !(item && depth >= indent);
      items.at(-1).push(line.slice(indent));
    } else if (item && kindOf(item[2]) === kindOf(marker) && !RULE.test(line)) {
      loose ||= blank;
      indent = item[3] === undefined ? item[1].length + item[2].length + 1 : item[0].length;
      items.push([line.slice(Math.min(indent, line.length))]);
    } else if (!blank && !startsBlock(lines, i)) {
      items.at(-1).push(line.trimStart());
    } else {
      break;
    }
    blank = false;
  }
  while (!lines[i - 1].trim()) i--;
  const ordered = /\d/.test(marker);
  return [{ kind: "list", ordered, first: ordered ? Number.parseInt(marker, 10) : 1, loose,
    items: items.map((item) => item.join("\n")) }, i];
}

/** The cells of a row. A bar in code or behind a backslash does not cut. */
function cells(line) {
  const row = [];
  let cell = "";
  let inCode = false;
  for (let i = 0; i < line.length; i++) {
    if (line[i] === "\\" && line[i + 1] === "|") {
      cell += "|";
      i++;
    } else if (line[i] === "|" && !inCode) {
      row.push(cell.trim());
      cell = "";
    } else {
      if (line[i] === "`") inCode = !inCode;
      cell += line[i];
    }
  }
  row.push(cell.trim());
  if (row[0] === "") row.shift();
  if (row.at(-1) === "") row.pop();
  return row;
}

function isTable(lines, i) {
  const rule = lines[i + 1] ?? "";
  if (!lines[i].includes("|") || !rule.includes("-") || !rule.includes("|")) return false;
  const marks = cells(rule);
  return marks.length > 0 && marks.every((cell) => CELL_RULE.test(cell)) && cells(lines[i]).length === marks.length;
}

function table(lines, start) {
  const align = cells(lines[start + 1]).map((cell) =>
    (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  const rows = [];
  let i = start + 2;
  for (; i < lines.length && lines[i].trim() && !startsBlock(lines, i); i++) {
    const row = cells(lines[i]);
    rows.push(align.map((_, column) => row[column] ?? ""));
  }
  return [{ kind: "table", align, head: cells(lines[start]), rows }, i];
}

function paragraph(lines, start) {
  let i = start + 1;
  while (i < lines.length && lines[i].trim() && !startsBlock(lines, i)) i++;
  return [{ kind: "paragraph", text: lines.slice(start, i).map((line) => line.trim()).join("\n") }, i];
}

/** Whether a line ends the paragraph before it. */
function startsBlock(lines, i) {
  const line = lines[i];
  const item = ITEM.exec(line);
  const interrupts = item && item[3] !== undefined && (!/\d/.test(item[2]) || /^1[.)]$/.test(item[2]));
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || interrupts || isTable(lines, i);
}
