"""What a dry run says: the plan and the estimate of what is to be done, as lines for a reader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.filesize import decimal

from embedding.errors import count
from embedding.run.report.wording import duration, said, share


def lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """The plan of a dry run, a fact or a few on each line; what shapes the vectors comes last, by the names of the fingerprint."""
    for name, text in _facts(plan):
        yield f"{name:<12}{text}"
    for name, value in plan["settings"].items():
        yield f"  {name:<18} {said(value)}"


def _facts(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    unreadable = f"; {count(plan['unreadable files'], 'file')} cannot be read" if plan["unreadable files"] else ""
    yield "corpus", f"{count(plan['source files'], 'file')}, {decimal(plan['source bytes'])}, {count(plan['rows'], 'row')}{unreadable}"
    stale = f"; {count(plan['stale shards'], 'shard')} would be removed" if plan["stale shards"] else ""
    yield "done", f"{count(plan['units done'], 'unit')}{stale}"
    yield "to do", f"{count(plan['units to do'], 'unit')}, {count(plan['rows to do'], 'row')}"
    if plan["units to do"]:
        yield from _texts(plan)
        yield from _work(plan)
    kept = ", ".join(f"{name} {value:,}" for name, value in plan["kept"].items())
    yield "kept", f"{kept} ({plan['kept from']})"
    yield "settings", f"fingerprint {plan['fingerprint']}"


def _texts(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "rows sampled" not in plan:
        yield "tokens", "unknown, because none of the sampled rows can be read"
        return
    error = plan["standard error of tokens"]
    if plan["rows sampled"] == plan["rows to do"]:
        origin = ", counted in every row"
    else:
        spread = " (of unknown accuracy)" if error is None else f" ± {error:,} (standard error)"
        origin = f"{spread}, estimated from {count(plan['rows sampled'], 'row')}"
    yield "tokens", f"{plan['tokens to do']:,}{origin}; {plan['tokens a row']:,} per row"
    windows = "" if plan["windows a row"] is None else f", {plan['windows a row']:,} windows per row"
    yield "texts", f"{share(plan['long share'], 1)} longer than max_tokens{windows}, {share(plan['rejected share'], 1)} cannot be embedded"


def _work(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    what = "judging by the existing shards" if plan["shard bytes measured"] else "for the vectors alone"
    yield "shards", f"about {decimal(plan['shard bytes'])}, {what}"
    yield "workers", f"{plan['workers']}; {plan['place']}"
    if plan.get("seconds") is None:
        known = "nothing was measured on such hardware; set --rate to the tokens per second of one worker"
        yield "time", f"unknown ({'the corpus is too small to measure' if plan['too small to measure'] else known})"
        return
    yield "time", f"about {duration(plan['seconds'])} of work at {plan['tokens a second']:,} tokens/s, {plan['rate']}"
    if not plan["GPU hours"]:
        yield "cost", "no GPU"
        return
    price = "; set --gpu-hour-price to see the cost" if plan["cost"] is None else f", cost {plan['cost']:,.2f}"
    yield "cost", f"about {plan['GPU hours']:,.2f} GPU hours{price}; startup, waiting and other nodes are not included"
