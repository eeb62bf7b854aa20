"""The page of a report: a single HTML file without scripts.

The page escapes all names, because they come from the store. The policy in its head also forbids a
browser to load or run anything.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ckptfs._model.plans import ranges
from ckptfs._model.plans.trace import Access, Fetch
from ckptfs._model.units import size_text
from ckptfs._model.wording import counted
from ckptfs._report.analysis import FileUse, ProcessUse, Summary, TensorUse, rates

_FILES_MAX = 60
_TENSORS_MAX = 200
_SLOWEST = 15
_SLOTS = 240
_WIDTH = 1000
"""Width of all drawings in their own units. A drawing is as wide as the page."""
_ROW = 20
_TICKS = 8
_MARKS_MAX = 400
"""Maximum number of tensors with borders on the drawing of one file."""

_STYLE = """
:root{color-scheme:light dark;--fg:#1c2530;--dim:#66717e;--bg:#fff;--card:#f5f7f9;--line:#dde3e9;
--read:#2f6fde;--wait:#d9601a;--demand:#8b3fc4;--readahead:#2a9d78;--prefetch:#8fa3b5;--waste:#e3a008;
--bad:#c81e3a}
@media(prefers-color-scheme:dark){:root{--fg:#e4e9ee;--dim:#95a1ad;--bg:#14191f;--card:#1d242c;
--line:#323c47;--read:#6d9ff5;--wait:#f28d4f;--demand:#bd85e8;--readahead:#4cc79e;--prefetch:#71859a;
--waste:#eec04a;--bad:#f2647b}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:28px 24px 60px;background:var(--bg);color:var(--fg);
font:14px/1.5 system-ui,sans-serif}
h1{font-size:20px;margin:0;overflow-wrap:anywhere}h2{font-size:16px;margin:36px 0 8px}
p{margin:4px 0}.dim,figcaption{color:var(--dim)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0}
.tiles div{background:var(--card);border-radius:8px;padding:12px 14px}
.tiles b{display:block;font-size:20px;font-variant-numeric:tabular-nums}
figure{margin:0}svg{display:block;width:100%;overflow:visible}
.grid{display:grid;grid-template-columns:minmax(120px,24%) 1fr;column-gap:14px;align-items:center}
.name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;direction:rtl;text-align:left;
font-size:12px}.name bdi{direction:ltr}
.key{display:inline-block;width:11px;height:11px;border-radius:2px;margin:0 5px 0 14px}
.key:first-child{margin-left:0}
.axis{display:flex;justify-content:space-between;color:var(--dim);font-size:12px}
table{border-collapse:collapse;width:100%;font-size:13px}
th{text-align:left;color:var(--dim);font-weight:500}
th,td{padding:3px 12px 3px 0;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.note{background:var(--card);border-left:3px solid var(--waste);padding:8px 14px;margin:8px 0}
"""


@dataclass
class About:
    """The checkpoint of a report. `began` is the time of its attach as text, and `commands` has the
    names of processes by pid."""

    uri: str
    version: str
    began: str
    size: int
    file_count: int
    notes: Sequence[str]
    commands: Mapping[int, str]


def render(about: About, summary: Summary, tensors: Sequence[TensorUse]) -> str:
    """Return the page. `tensors` are those with reads."""
    body = [
        f"<h1>{escape(about.uri)}</h1>",
        f"<p class=dim>attached {escape(about.began)} · {counted(about.file_count, 'file')}, "
        f"{size_text(about.size)} · version {escape(about.version)}</p>",
        *(f"<p class=note>{escape(note)}</p>" for note in about.notes),
        _tiles(about, summary),
    ]
    if summary.files:
        shown = summary.files[:_FILES_MAX]
        body += [
            _section("Throughput", _throughput(summary)),
            _section("Timeline", _timeline(shown, summary.seconds), _more(summary.files)),
            _section("Which bytes", _maps(shown, tensors), _more(summary.files)),
        ]
    if tensors:
        left_out = len(tensors) - _TENSORS_MAX
        more = f"and {left_out} more" if left_out > 0 else ""
        body.append(_section("Tensors, by first read", _tensors(tensors[:_TENSORS_MAX]), more))
    if summary.requests:
        body.append(_section("Slowest requests", _slowest(summary.files)))
    if summary.processes:
        body.append(_section("Processes", _processes(summary.processes, about.commands)))
    return (
        '<!doctype html><html lang=en><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        '<meta name=viewport content="width=device-width">'
        f"<title>{escape(about.uri)}</title><style>{_STYLE}</style>\n"
        + "\n".join(body)
        + "\n</html>\n"
    )


def _section(title: str, content: str, more: str = "") -> str:
    tail = f"<p class=dim>{more}</p>" if more else ""
    return f"<h2>{title}</h2>{content}{tail}"


def _more(files: Sequence[FileUse]) -> str:
    left_out = len(files) - _FILES_MAX
    return f"and {counted(left_out, 'file')} more, used later" if left_out > 0 else ""


def _tiles(about: About, summary: Summary) -> str:
    wasted = summary.waste_bytes / summary.fetched_bytes if summary.fetched_bytes else 0.0
    tiles = [
        (_seconds(summary.seconds), "from the attach to the last read"),
        (size_text(summary.read_bytes), f"read, of {size_text(about.size)}"),
        (size_text(summary.fetched_bytes), f"from the store in {summary.requests} requests"),
        (f"{100 * wasted:.1f} %", "of that never read"),
        (f"{100 * summary.hit_ratio:.1f} %", f"of {summary.reads} reads did not wait"),
        (_seconds(summary.waited_s), "of waiting, all readers together"),
    ]
    if summary.failed:
        tiles.append((str(summary.failed), "fetches failed"))
    cells = "".join(f"<div><b>{value}</b>{text}</div>" for value, text in tiles)
    return f"<div class=tiles>{cells}</div>"


# -- over time


def _throughput(summary: Summary) -> str:
    fetches = [f for use in summary.files for f in use.fetches if not f.error]
    accesses = [a for use in summary.files for a in use.accesses]
    stored, read = (
        rates(((m.began_s, m.ended_s, m.stop - m.start) for m in moments), summary.seconds, _SLOTS)
        for moments in (fetches, accesses)
    )
    most = max([*stored, *read], default=0.0) or 1.0
    height = 140
    curves = _curve(stored, most, height, "readahead", fill=True)
    curves += _curve(read, most, height, "read")
    return (
        f"<figure>{_legend([('readahead', 'from the store'), ('read', 'to readers')])}"
        f"{_drawing(height, _grid_lines(height) + curves)}{_time_axis(summary.seconds)}"
        f"<figcaption>highest: {size_text(round(most))}/s</figcaption></figure>"
    )


def _curve(
    values: Sequence[float], most: float, height: int, colour: str, *, fill: bool = False
) -> str:
    step = _WIDTH / len(values)
    points = " ".join(
        f"{step * (slot + 0.5):.1f},{height * (1 - value / most):.1f}"
        for slot, value in enumerate(values)
    )
    if fill:
        points = f"0,{height} {points} {_WIDTH},{height}"
        return f'<polygon points="{points}" fill="var(--{colour})" opacity=".35"/>'
    return (
        f'<polyline points="{points}" fill="none" stroke="var(--{colour})" stroke-width="1.8" '
        'vector-effect="non-scaling-stroke"/>'
    )


def _timeline(files: Sequence[FileUse], seconds: float) -> str:
    legend = [
        ("read", "read"),
        ("wait", "read after a wait"),
        ("demand", "fetched for a waiting reader"),
        ("readahead", "fetched ahead of readers"),
        ("prefetch", "fetched by a prefetch"),
        ("bad", "failed fetch"),
    ]
    rows = "".join(
        _name(use.path) + _drawing(_ROW, _grid_lines(_ROW) + _bars_of(use, seconds))
        for use in files
    )
    return (
        f"<figure>{_legend(legend)}<div class=grid>{rows}<span></span>"
        f"{_time_axis(seconds)}</div></figure>"
    )


def _bars_of(use: FileUse, seconds: float) -> str:
    scale = _WIDTH / (seconds or 1.0)
    reads = [
        _Bar(a.began_s * scale, a.ended_s * scale, "wait" if a.waits else "read", _about_access(a))
        for a in use.accesses
    ]
    fetches = [
        _Bar(f.began_s * scale, f.ended_s * scale, "bad" if f.error else f.purpose, _about_fetch(f))
        for f in sorted(use.fetches, key=lambda fetch: fetch.began_s)
    ]
    return "".join([*_joined(reads, top=1), *_joined(fetches, top=11)])


@dataclass
class _Bar:
    left: float
    right: float
    colour: str
    title: str
    count: int = 1


def _joined(bars: Iterable[_Bar], top: int) -> Iterable[str]:
    """Draw the bars, and join neighbours that look the same."""
    last: _Bar | None = None
    for bar in bars:
        if last is not None and bar.colour == last.colour and bar.left <= last.right + 0.5:
            last.right = max(last.right, bar.right)
            last.count += 1
            continue
        if last is not None:
            yield _rectangle(last, top)
        last = bar
    if last is not None:
        yield _rectangle(last, top)


def _rectangle(bar: _Bar, top: int) -> str:
    title = bar.title if bar.count == 1 else f"{bar.title}, and {bar.count - 1} more"
    return (
        f'<rect x="{bar.left:.2f}" y="{top}" width="{max(1.5, bar.right - bar.left):.2f}" '
        f'height="8" rx="1" fill="var(--{bar.colour})"><title>{escape(title)}</title></rect>'
    )


def _about_access(access: Access) -> str:
    waited = f"{_seconds(access.waited_s)} waited in {access.waits}" if access.waits else "no wait"
    return (
        f"{_range(access.start, access.stop)} by process {access.pid}: "
        f"{counted(access.reads, 'read')}, {waited}; {_from_to(access.began_s, access.ended_s)}"
    )


def _about_fetch(fetch: Fetch) -> str:
    again = f", {fetch.tries} tries" if fetch.tries > 1 else ""
    failed = f"; failed: {fetch.error}" if fetch.error else ""
    return (
        f"{_range(fetch.start, fetch.stop)} ({fetch.purpose}{again}): "
        f"{_from_to(fetch.began_s, fetch.ended_s)}{failed}"
    )


def _from_to(began_s: float, ended_s: float) -> str:
    return f"{began_s:.3f} s to {ended_s:.3f} s"


# -- over bytes


def _maps(files: Sequence[FileUse], tensors: Sequence[TensorUse]) -> str:
    borders: dict[str, list[int]] = {}
    for found in tensors:
        borders.setdefault(found.path, []).append(found.tensor.start)
    legend = [
        ("read", "read"),
        ("waste", "fetched and not read"),
        ("prefetch", "fetched, and possibly read by the kernel itself"),
        ("line", "neither fetched nor read"),
    ]
    rows = "".join(f"{_name(use.path)}{_map(use, borders.get(use.path, []))}" for use in files)
    return (
        f"<figure>{_legend(legend)}<div class=grid>{rows}</div>"
        "<figcaption>From the first byte of a file to its last. A vertical line is the beginning "
        "of a tensor with reads.</figcaption></figure>"
    )


def _map(use: FileUse, borders: Sequence[int]) -> str:
    scale = _WIDTH / (use.size or 1)
    parts = [f'<rect y="3" width="{_WIDTH}" height="12" fill="var(--line)"/>']
    unseen = ranges.without(use.fetched, use.read) if use.is_passthrough else []
    for found, colour in ((use.read, "read"), (use.waste, "waste"), (unseen, "prefetch")):
        parts += _joined(
            (_Bar(a * scale, b * scale, colour, _range(a, b)) for a, b in found), top=5
        )
    if len(borders) <= _MARKS_MAX:
        parts += [
            f'<line x1="{at * scale:.2f}" x2="{at * scale:.2f}" y1="0" y2="18" stroke="var(--dim)" '
            'stroke-width="1" vector-effect="non-scaling-stroke"/>'
            for at in borders
        ]
    title = (
        f"{size_text(ranges.length(use.read))} read, {size_text(ranges.length(use.waste))} fetched "
        f"and not read, of {size_text(use.size)}"
    )
    return _drawing(18, f"<title>{title}</title>{''.join(parts)}")


# -- tables


def _tensors(tensors: Sequence[TensorUse]) -> str:
    return _table(
        ["first read", "tensor", "dtype", "shape", "size", "read", "file"],
        [
            [
                _seconds(use.first_s),
                use.tensor.name,
                use.tensor.dtype,
                "×".join(map(str, use.tensor.shape)) or "scalar",
                size_text(use.tensor.end - use.tensor.start),
                f"{100 * use.read_bytes / (use.tensor.end - use.tensor.start):.0f} %",
                use.path,
            ]
            for use in tensors
        ],
        right=(0, 4, 5),
    )


def _slowest(files: Sequence[FileUse]) -> str:
    fetches = [(fetch, use.path) for use in files for fetch in use.fetches]
    fetches.sort(key=lambda pair: pair[0].began_s - pair[0].ended_s)
    return _table(
        ["took", "waited before", "bytes", "rate", "why", "tries", "when", "file", "error"],
        [
            [
                _seconds(fetch.ended_s - fetch.began_s),
                _seconds(fetch.began_s - fetch.wanted_s),
                _range(fetch.start, fetch.stop),
                _rate(fetch),
                fetch.purpose,
                str(fetch.tries),
                _seconds(fetch.began_s),
                path,
                fetch.error,
            ]
            for fetch, path in fetches[:_SLOWEST]
        ],
        right=(0, 1, 3, 5, 6),
    )


def _rate(fetch: Fetch) -> str:
    seconds = fetch.ended_s - fetch.began_s
    if fetch.error or seconds <= 0:
        return ""
    return f"{size_text(round((fetch.stop - fetch.start) / seconds))}/s"


def _processes(processes: Sequence[ProcessUse], commands: Mapping[int, str]) -> str:
    return _table(
        ["process", "command", "files", "read", "reads", "of these waited", "waited together"],
        [
            [
                str(process.pid) if process.pid else "of another pid namespace",
                commands.get(process.pid, ""),
                str(process.files),
                size_text(process.read_bytes),
                str(process.reads),
                str(process.waits),
                _seconds(process.waited_s),
            ]
            for process in processes
        ],
        right=(2, 3, 4, 5, 6),
    )


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], right: tuple[int, ...] = ()
) -> str:
    def cells(kind: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{kind}{' class=n' if position in right else ''}>{escape(value)}</{kind}>"
            for position, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', columns)}</tr>{body}</table>"


# -- small parts


def _drawing(height: int, content: str) -> str:
    """A drawing as wide as the page, and `height` pixels high."""
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" preserveAspectRatio=none style="height:{height}px">'
        f"{content}</svg>"
    )


def _name(path: str) -> str:
    text = escape(path, quote=True)
    return f'<span class=name title="{text}"><bdi>{text}</bdi></span>'


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    keys = "".join(
        f'<span class=key style="background:var(--{colour})"></span>{text}'
        for colour, text in entries
    )
    return f"<p class=dim>{keys}</p>"


def _grid_lines(height: int) -> str:
    return "".join(
        f'<line x1="{at}" x2="{at}" y1="0" y2="{height}" stroke="var(--line)" '
        'vector-effect="non-scaling-stroke"/>'
        for at in range(0, _WIDTH + 1, _WIDTH // _TICKS)
    )


def _time_axis(seconds: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(seconds))) if seconds > 0 else 0
    ticks = "".join(f"<span>{seconds * i / _TICKS:.{digits}f} s</span>" for i in range(_TICKS + 1))
    return f"<div class=axis>{ticks}</div>"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        digits = max(0, 2 - math.floor(math.log10(seconds)))
        return f"{seconds:.{digits}f} s"
    return f"{1000 * seconds:.{0 if seconds >= 0.1 else 1}f} ms"


def _range(start: int, stop: int) -> str:
    return f"{size_text(stop - start)} at {start:,}"
