"""What a run came to: the figures that were promised, what is wrong, and the table that is printed."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.figures import Line
from benchmarks.harness.tables import MEGABYTE, aligned
from benchmarks.registry import CANDIDATES, GPU_FIGURES

__all__ = ["figures", "problems", "table"]

# What an item has that came to nothing, without being wrong.
IDLE = ("skipped", "unfinished")
# Stages in which every backend that is asked for has to run, and which candidate each is there.
_PROVING = "correctness"
_TIMING = ("core", "rivals", "compiled")
_OUT_OF_TIME = ("stopped after", "no time left")
HEADINGS = {name: candidate.heading for name, candidate in CANDIDATES["gpu"].items()}


def shapes(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one record per timed shape, candidates of all stages together, with the anchors each stage had."""
    found: dict[tuple[int, int, bool], dict[str, Any]] = {}
    for stage in ("core", "rivals", "compiled"):
        items = result["stages"].get(stage, {}).get("items", {})
        for record in items.values():
            if "samples" not in record:
                continue
            key = (record["batch"], record["length"], record["backward"])
            whole = found.setdefault(key, {**record, "samples": {}, "memory": {}, "reasons": {}, "against": {}})
            anchor = record["samples"].get("bare")
            for name, sample in record["samples"].items():
                whole["samples"].setdefault(name, sample)
                if anchor:  # ratios are taken within one stage, where both ran in turn
                    whole["against"].setdefault(name, sample["median"] / anchor["median"])
            for name in ("memory", "reasons"):
                for candidate, value in record[name].items():
                    whole[name].setdefault(candidate, value)
    return sorted(found.values(), key=lambda record: (record["backward"], record["length"]))


def figures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every promised figure with what was measured, or without a value where nothing was."""
    by_key = {(record["length"], record["backward"]): record for record in shapes(result)}
    found = []
    for figure in GPU_FIGURES:
        record = by_key.get((figure.shape.length, figure.shape.backward), {})
        if figure.sense == "memory":
            memory = record.get("memory", {}).get(figure.ours)
            value = None if memory is None else memory["steady"] / MEGABYTE
        else:
            # How many times longer than ours the best of the others takes.
            against = record.get("against", {})
            value = min((against[name] for name in figure.others if name in against), default=None)
        found.append(_as_json(figure.line(median=value, best=value)))
    return found


def _as_json(line: Line) -> dict[str, Any]:
    kept = {name: getattr(line, name) for name in ("title", "case", "must", "aim", "higher", "unit", "verdict")}
    return {**kept, "value": line.median}


def _cell(record: dict[str, Any], name: str) -> str:
    if name in record["samples"]:
        text = f"{record['samples'][name]['median'] * 1e3:.3f}"
        ratio = record["against"].get(name)
        return text if ratio is None or name in ("bare",) else f"{text} ({ratio:.2f}x)"
    reason = record["reasons"].get(name, "")
    return (
        "no memory"
        if reason == "out of memory"
        else "WRONG"
        if reason.startswith("wrong")
        else "failed"
        if reason
        else "-"
    )


def _times(result: dict[str, Any]) -> list[str]:
    records = shapes(result)
    names = [name for name in HEADINGS if any(name in r["samples"] or name in r["reasons"] for r in records)]
    lines = []
    for backward in (False, True):
        chosen = [record for record in records if record["backward"] is backward]
        if not chosen:
            continue
        head = ["forward + backward" if backward else "forward", *(HEADINGS[name] for name in names), "over floor"]
        rows = [head]
        for record in chosen:
            floor, mine = record.get("floor"), record["samples"].get("bare")
            over = f"{mine['median'] / floor['seconds']:.1f}x" if floor and mine else "-"
            rows.append([record["label"], *(_cell(record, name) for name in names), over])
        lines += [aligned(rows), ""]
        rows = [["extra MB", *(HEADINGS[name] for name in names)]]
        for record in chosen:
            memory = {name: record["memory"].get(name) for name in names}
            cells = ["-" if x is None else f"{x['steady'] / MEGABYTE:.1f}" for x in memory.values()]
            rows.append([record["label"], *cells])
        lines += [aligned(rows), ""]
    return lines


def _state(record: dict[str, Any]) -> str:
    items = record["items"]
    failed = [name for name, item in items.items() if item.get("ok") is False]
    skipped = sorted({item["skipped"] for item in items.values() if "skipped" in item})
    idle = [name for name, item in items.items() if item.get("ok") is not False and not item.keys().isdisjoint(IDLE)]
    parts = [f"{len(items) - len(failed) - len(idle)} of {len(items)} fine"]
    parts += [f"FAILED: {', '.join(failed[:8])}{' ...' if len(failed) > 8 else ''}"] if failed else []
    parts += [f"skipped: {'; '.join(skipped)[:200]}"] if skipped else []
    unfinished = [name for name, item in items.items() if "unfinished" in item]
    parts += [f"unfinished: {', '.join(unfinished)}"] if unfinished else []
    others = [text for item in items.values() for text in item.get("failed_of_others", ())]
    parts += [f"of others failed: {'; '.join(others)[:300]}"] if others else []
    if not record["complete"]:
        parts.append(f"not complete: {record['broken'][:200] or 'running'}")
    return "; ".join(parts)


def _models(result: dict[str, Any]) -> list[str]:
    rows = [["whole model, ms", "", "extra MB", "times unpatched"]]
    for name, record in result["stages"].get("models", {}).get("items", {}).items():
        base = record.get("samples", {}).get("unpatched")
        for candidate, sample in record.get("samples", {}).items():
            memory = record["memory"].get(candidate)
            extra = "-" if memory is None else f"{memory['steady'] / MEGABYTE:.0f}"
            speed = f"{base['median'] / sample['median']:.2f}x" if base else "-"
            rows.append([f"{name}, {candidate}", f"{sample['median'] * 1e3:.3f}", extra, speed])
    return [aligned(rows), ""] if len(rows) > 1 else []


def table(result: dict[str, Any]) -> str:
    """Return the whole result as aligned text: conditions, times, memory, figures, and what each stage came to."""
    device, commit = result["device"], result["commit"]
    versions = ", ".join(f"{name} {version}" for name, version in device.get("versions", {}).items())
    changed = " with changes" if commit["modified"] else ""
    lines = [f"{device.get('name', 'unknown device')}; {versions}; commit {(commit['id'] or 'unknown')[:8]}{changed}"]
    lines.append(f"plan: {result['plan']}")
    rates = result.get("rates", {})
    if rates:
        copy, product = rates.get("copy_bytes_per_second", 0), rates.get("bfloat16_flops_per_second", 0)
        lines.append(f"ceilings: copy {copy / 1e12:.3f} TB/s, bfloat16 products {product / 1e12:.1f} TFLOP/s")
    lines += ["times in ms, medians; (how many times ours)", "", *_times(result), *_models(result)]
    rows = [["figure", "", "must", "aim", "measured", "verdict"]]
    for x in result["figures"]:
        sign, value = ("≥" if x["higher"] else "≤"), ("-" if x["value"] is None else f"{x['value']:.2f}{x['unit']}")
        rows.append([x["title"], x["case"], f"{sign} {x['must']:g}", f"{sign} {x['aim']:g}", value, x["verdict"]])
    lines += [aligned(rows), ""]
    lines += [f"{name}: {_state(record)}, {record['seconds']:.0f} s" for name, record in result["stages"].items()]
    lines.append(f"{result['seconds']:.0f} s in all")
    wrong = result.get("problems", [])
    lines.append(f"FAILED, {len(wrong)}:" if wrong else "nothing is wrong with what ran")
    return "\n".join([*lines, *(f"  {text}" for text in wrong)])


def problems(result: dict[str, Any]) -> list[str]:
    """Return what is wrong, a line each: wrong answers, what broke, and what was asked for and did not run.

    A stage that ran out of time is none as long as something of everything that was asked for ran.
    """
    found = []
    for name, record in result["stages"].items():
        items = record["items"]
        found += [f"{name}: {item} failed" for item, one in items.items() if one.get("ok") is False]
        ran = {item: one for item, one in items.items() if "unfinished" not in one}
        if record["broken"] and not record["broken"].startswith(_OUT_OF_TIME):
            found.append(f"{name}: broke off: {record['broken'][:300]}")
        elif not ran:
            found.append(f"{name}: nothing of it ran: {record['broken'] or 'it has no items'}")
        if name == _PROVING:
            proven = {one.get("backend") for one in ran.values()}
            found += [f"{name}: backend {backend} did not run" for backend in result["asked"] if backend not in proven]
        if name in _TIMING:
            found += [f"{name}: {candidate} was never timed: {why}" for candidate, why in _untimed(ran).items()]
    return found


def _untimed(items: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the candidates that were asked for and have no time at any shape, with a reason; memory may lack."""
    timed = {name for one in items.values() for name in one.get("samples", {})}
    found: dict[str, str] = {}
    for one in items.values():
        for name in set(one.get("asked", ())) - timed:
            reason = one.get("reasons", {}).get(name, "no reason is known")
            found[name] = found.get(name, "out of memory") if reason == "out of memory" else reason[:200]
    return {name: why for name, why in sorted(found.items()) if why != "out of memory"}
