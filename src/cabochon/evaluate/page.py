"""A report as one HTML file: the table, bars, and every item with a filter. It stands alone and loads nothing."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cabochon.base.plot import Bar, bar_plot
from cabochon.evaluate.results import Item, Report, Result
from cabochon.evaluate.show import name, notes, rows

MOST = 500  # items of a task in the page; all of them are in the files beside it

_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}
th,td{padding:.25rem .7rem;border-bottom:1px solid #8886;text-align:right}
th:first-child,td:first-child{text-align:left}
.scroll{overflow-x:auto}
svg{max-width:100%;height:auto}
details{border-bottom:1px solid #8886;padding:.3rem 0}
summary{cursor:pointer}
.wrong>summary{color:#b3261e}
@media (prefers-color-scheme:dark){.wrong>summary{color:#ff8a80}}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0;padding:.5rem;background:#8881}
.filter{display:flex;gap:1rem;flex-wrap:wrap;margin:.5rem 0}
input[type=search]{min-width:18rem}
"""
# Shows the items of one task that hold a text, or only those that are wrong.
_SCRIPT = """
for (const part of document.querySelectorAll('section.items')) {
  const text = part.querySelector('input[type=search]'), wrong = part.querySelector('input[type=checkbox]');
  const count = part.querySelector('output'), items = [...part.querySelectorAll('details.item')];
  const apply = () => {
    let shown = 0;
    for (const item of items) {
      const fits = item.textContent.toLowerCase().includes(text.value.toLowerCase());
      item.hidden = !(fits && (!wrong.checked || item.classList.contains('wrong')));
      shown += !item.hidden;
    }
    count.textContent = `${shown} of ${items.length}`;
  };
  text.addEventListener('input', apply);
  wrong.addEventListener('change', apply);
  apply();
}
"""


def page(report: Report, items: Mapping[str, Sequence[Item]]) -> str:
    """The whole page."""
    parts = [f"<h1>{escape(report.model)}</h1>", _settings(report), _table(*rows(report)), chart(report)]
    parts += [f"<p>{escape(note)}</p>" for note in notes(report)]
    parts += [f"<p>{escape(f.what)}: {escape(f.cause)}. {escape(f.hint)}</p>" for f in report.failures]
    for task, of_task in items.items():
        counting = next((r for r in report.results if r.task == task and r.counts), None)
        parts.append(_items(task, of_task, counting))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(report.model)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n<script>{_SCRIPT}</script>\n</body></html>\n"
    )


def chart(report: Report) -> str:
    """Bars of the scores that are shares, with two standard errors and what they are compared to."""
    chosen = [r for r in report.results if r.counts and r.part_of is None and r.percent]
    bars = [Bar(r.label, 100 * r.value, 200 * (r.stderr or 0.0), _others(r)) for r in chosen]
    return bar_plot(bars, title=f"{report.model}, in percent", x_label="percent, ± 2 standard errors") if bars else ""


def _others(r: Result) -> dict[str, float]:
    named = {"random": r.random, "majority": r.majority, **r.published}
    return {who: 100 * value for who, value in named.items() if value is not None}


def _settings(report: Report) -> str:
    known = [f"{key} {value}" for key, value in report.settings.items() if value not in (None, "", False)]
    return f"<p>{escape(', '.join(known))}</p>" if known else ""


def _table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>\n" for row in cells)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _items(task: str, items: Sequence[Item], counting: Result | None) -> str:
    metric, _, kind = counting.metric.partition(",") if counting else ("", "", "")
    chosen = [item for item in items if not kind or item["filter"] == kind]
    shown = "\n".join(_item(item, metric) for item in chosen[:MOST])
    rest = f"<p>The first {MOST} of {len(chosen)}; all are in items/{escape(task)}.jsonl.</p>" if chosen[MOST:] else ""
    head = escape(name(counting)) if counting else escape(task)
    return (
        f'<section class="items"><h2>{head}</h2>{rest}<div class="filter">'
        '<label>Only items with <input type="search"></label>'
        '<label><input type="checkbox"> only wrong ones</label><output></output></div>\n'
        f"{shown}</section>"
    )


def _item(item: Item, metric: str) -> str:
    score = item["scores"].get(metric)
    wrong = score in (0, 0.0, False)
    prompts = item["prompt"] if isinstance(item["prompt"], list) else [item["prompt"]]
    fields = {
        "prompt": "\n\n".join(map(str, prompts)),
        "choices": item["choices"],
        "target": item["target"],
        "said": item["raw"] if item["raw"] != item["answers"] else None,
        "answers": item["answers"],
        "scores": item["scores"],
    }
    body = "".join(
        f"<b>{key}</b><pre>{escape(_text(value))}</pre>" for key, value in fields.items() if value is not None
    )
    last = prompts[-1].strip().splitlines()[-2:]
    title = f"{item['id']}: {' '.join(last)[-120:]}" + ("" if score is None else f" ({_text(score)})")
    return f'<details class="item{" wrong" if wrong else ""}"><summary>{escape(title)}</summary>{body}</details>'


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
