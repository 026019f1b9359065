"""Rows as tables for people."""

from __future__ import annotations

from .contenders import NAIVE
from .measurement import best_naive


def groups(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(case, dtype, pass) -> its rows, in the order of the file."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["case"], row["dtype"], row["pass"]), []).append(row)
    return found


def table(rows: list[dict]) -> str:
    """One line per row: milliseconds, the ratio of the best naive layer to it, memory, share of the floor."""
    lines = []
    for (_, dtype, pass_name), group in groups(rows).items():
        first = group[0]
        lines.append(
            f"\n{first['case']}  ({first['shape']})  {dtype}  {pass_name}: floor {first['floor_ms']:.2f} ms "
            f"({first['floor']}), arguments {_mib(first['argument_bytes'])}, output {_mib(first['output_bytes'])}"
        )
        lines.append(
            f"  {'':<16}{'layout':<15}{'min ms':>10}{'median':>10}{'best naive':>12}{'peak':>11}{'saved':>11}"
            f"{'of floor':>10}{'error':>10}"
        )
        best = best_naive(group)
        for row in group:
            head = f"  {row['contender']:<16}{row['layout']:<15}"
            if row["status"] != "ok":
                lines.append(f"{head}{row['status'].upper()}: {row['note']}")
                continue
            ratio = "1 (best)" if row is best else "" if best is None else f"{row['ratio']:.2f}x"
            lines.append(
                f"{head}{_ms(row['min_ms']):>10}{_ms(row['median_ms']):>10}{ratio:>12}{_mib(row.get('peak_bytes')):>11}"
                f"{_mib(row.get('saved_bytes')):>11}{row['fraction_of_floor']:>10.0%}{row['error']:>10.0e}"
            )
    return "\n".join(lines)


def summary(rows: list[dict]) -> str:
    """One line per case, dtype and pass, all in the layout (nc: contiguous, cl: channels-last) of the best naive.

    Per backend: its time, how many times faster than the naive layer, share of the floor, and in brackets its peak
    memory over the naive layer's.
    """
    found = groups(rows)
    names = list(dict.fromkeys(row["contender"] for row in rows if row["contender"] != NAIVE))
    head = f"{'case':<18}{'dtype':<10}{'pass':<11}{'naive ms':>12}"
    lines = [head + "".join(f"{name:>30}" for name in names)]
    for (case, dtype, pass_name), group in found.items():
        line = f"{case:<18}{dtype:<10}{pass_name:<11}"
        best = best_naive(group)
        layout = best["layout"] if best else group[0]["layout"]
        short = "nc" if layout == "contiguous" else "cl"
        line += f"{_ms(best['min_ms']):>9} {short}" if best else f"{'not ok':>12}"
        in_layout = {row["contender"]: row for row in group if row["layout"] == layout}
        line += "".join(f"{_brief(in_layout.get(name), best):>30}" for name in names)
        lines.append(line)
    return "\n".join(lines)


def _brief(row: dict | None, best: dict | None) -> str:
    if row is None:
        return "-"
    if row["status"] != "ok":
        return row["status"].upper()
    parts = [_ms(row["min_ms"])]
    if best is not None:
        parts.append(f"{row['ratio']:.2f}x")
    parts.append(f"{row['fraction_of_floor']:.0%}")
    if best is not None and row.get("peak_bytes") is not None and best.get("peak_bytes"):
        parts.append(f"({row['peak_bytes'] / best['peak_bytes']:.2f})")
    return " ".join(parts)


def _mib(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f} MiB"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds >= 1 else f"{milliseconds:.3f}"
