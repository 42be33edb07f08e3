"""The report as one self-contained HTML page."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Final

from t5g2convert.parity.reports.report import Check, Drift, Report
from t5g2convert.printable import printable
from t5g2convert.version import __version__

STYLE: Final = """
:root { color-scheme: light dark; --good: #1a7f37; --bad: #cf222e; --line: #8885; --bar: #3b82f6; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.passed { color: var(--good); } .failed { color: var(--bad); }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font-size: .9em; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
"""

WIDTH: Final = 900
HEIGHT: Final = 150
FLOOR: Final = 1e-9
"""Smaller relative differences are drawn at the foot of a plot; 0 has no bar."""

PARTS: Final = ("embedding", "encoder", "decoder", "vision", "projector")


def html(report: Report) -> str:
    """Return the page, which loads nothing from elsewhere."""
    verdict = "passed" if report.passed else "failed"
    sections = [
        f'<h1 class="{verdict}">Verification {verdict}{"" if report.complete else ", without the source"}</h1>',
        f"<p><code>{_escaped(str(report.output))}</code>{_against(report)}</p>",
        _checks(report),
        *(f"<p>{_escaped(remark)}.</p>" for remark in report.remarks),
        *(_plot(check) for check in report.checks if check.figures is not None and check.figures.drifts),
        *(_movements(check) for check in report.checks if check.movements),
        _parameters(report.parameters),
        f"<p><small>t5g2convert {_escaped(__version__)}</small></p>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>t5g2 verify: {verdict}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


def _against(report: Report) -> str:
    if report.source is None:
        return ", judged without its source"
    exact = "exactly" if report.tolerance == 0 else f"within {report.tolerance:g} of the largest value"
    return (
        f" against <code>{_escaped(str(report.source))}</code>, compared {exact}, "
        f"in {_escaped(str(report.dtype))} on {_escaped(report.device)}"
    )


def _checks(report: Report) -> str:
    rows = [_check_row(check) for check in report.checks]
    rows += [
        f"<tr><td>not made</td><td>{_escaped(name)}</td><td>{_escaped(because)}</td></tr>"
        for name, because in report.skipped.items()
    ]
    return (
        "<h2>Checks</h2><table><thead><tr><th></th><th>check</th><th>what was compared and found</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _check_row(check: Check) -> str:
    verdict = "passed" if check.passed else "failed"
    cell = _escaped(check.detail)
    if len(check.offenders) > 1:
        listed = "".join(f"<li><code>{_escaped(name)}</code></li>" for name in check.offenders[:200])
        cell += f"<details><summary>all {len(check.offenders)}</summary><ul>{listed}</ul></details>"
    return f'<tr><td class="{verdict}">{verdict}</td><td>{_escaped(check.name)}</td><td>{cell}</td></tr>'


def _plot(check: Check) -> str:
    """Plot the relative difference after every layer on a logarithmic scale; the plot of equal layers is empty."""
    assert check.figures is not None
    drifts = check.figures.drifts
    step = WIDTH / len(drifts)
    bars = "".join(_bars(drifts, step))
    equal = sum(drift.max_abs == 0 for drift in drifts)
    caption = f"{equal} of {len(drifts)} stages equal"
    if check.figures.departs is not None:
        caption += f"; departs at {check.figures.departs}"
    return (
        f"<h2>{_escaped(check.name)}, layer by layer</h2><p>{_escaped(caption)}</p>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 20}" role="img" aria-label="{_escaped(caption)}">'
        f'<line x1="0" y1="{HEIGHT}" x2="{WIDTH}" y2="{HEIGHT}" stroke="currentColor"/>{bars}'
        f'<text x="0" y="{HEIGHT + 14}">{_escaped(drifts[0].layer)}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 14}" text-anchor="end">{_escaped(drifts[-1].layer)}</text>'
        f'<text x="0" y="11">relative difference, 1 at the top, {FLOOR:g} at the foot</text></svg>'
    )


def _bars(drifts: Sequence[Drift], step: float) -> Iterator[str]:
    for number, drift in enumerate(drifts):
        if not drift.max_abs:
            height = 0.0
        elif math.isfinite(drift.relative):
            height = HEIGHT * (1 + math.log10(min(max(drift.relative, FLOOR), 1.0)) / -math.log10(FLOOR))
        else:
            height = float(HEIGHT)
        title = f"{drift.layer}: {drift.max_abs:.3g} ({drift.relative:.2g} of the largest value)"
        yield (
            f"<g><title>{_escaped(title)}</title>"
            f'<rect x="{number * step:.1f}" y="0" width="{step:.1f}" height="{HEIGHT}" fill="transparent"/>'
            f'<rect x="{number * step + 1:.1f}" y="{HEIGHT - height:.1f}" width="{max(step - 2, 1):.1f}" '
            f'height="{height:.1f}" fill="var(--bar)"/></g>'
        )


def _movements(check: Check) -> str:
    """Return a table of how far each layer of a part is from the start of the training."""
    rows = "".join(
        f'<tr><td>{_escaped(each.name)}</td><td class="number">{each.tensors - each.unmoved} of {each.tensors}</td>'
        f'<td class="number">{each.distance:.3%}</td></tr>'
        for each in check.movements
    )
    return (
        f"<h2>{_escaped(check.name)}, how far from its start</h2><table><thead><tr><th></th><th>tensors moved</th>"
        f"<th>distance, as a part of the start's length</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _parameters(parameters: Mapping[str, int]) -> str:
    counts = {part: parameters[part] for part in PARTS if type(parameters.get(part)) is int}
    total = sum(counts.values())
    if not total:
        return ""
    rows = "".join(
        f'<tr><td>{part}</td><td class="number">{count:,}</td><td class="number">{count / total:.1%}</td></tr>'
        for part, count in counts.items()
    )
    return (
        "<h2>Parameters</h2><table><thead><tr><th>part</th><th>parameters</th><th>share</th></tr></thead>"
        f'<tbody>{rows}<tr><th>total</th><td class="number">{total:,}</td><td></td></tr></tbody></table>'
    )


def _escaped(text: str) -> str:
    """Return untrusted text, escaped for the page."""
    return escape(printable(text))
