"""Progress bars on standard error, and silence where nobody watches."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def track(total: float | None, label: str, *, unit: str = "steps") -> Iterator[Callable[[float], None]]:
    """A bar while the block runs; the function it gives is called with how much was done since the last call.

        with track(file_size, "reading", unit="bytes") as advance:
            advance(len(chunk))

    `total` None shows a bar without an end. With `unit="bytes"` amounts are shown as kB, MB and so on. Nothing is
    shown when standard error is not a terminal.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich import progress
    from rich.console import Console

    amount = progress.DownloadColumn() if unit == "bytes" else progress.MofNCompleteColumn()
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        amount,
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)
