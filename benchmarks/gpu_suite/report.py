"""The lines of `benchmarks/gpu.py` as Markdown, for RESULTS.md."""

from collections.abc import Iterator

PHASES = ("rollout", "decode", "reward", "update", "total")


def markdown(lines: list[dict]) -> str:
    """One section per card and date."""
    parts = []
    for card, date in sorted({(line["device"], line["date"]) for line in lines}):
        mine = [line for line in lines if (line["device"], line["date"]) == (card, date)]
        title = f"### {card}, {date}, PyTorch {mine[0]['torch']}"
        parts.append("\n".join([title, "", *tables(mine)]))
    return "\n\n".join(parts) or "no results yet"


def tables(lines: list[dict]) -> Iterator[str]:
    good = [line for line in lines if "error" not in line and "skipped" not in line]
    yield from tiny([line for line in good if line["case"].startswith("tiny/")])
    yield from sized([line for line in good if "computed_gib" in line])
    yield from orders([line for line in good if "one_by_one" in line])
    for line in lines:
        for key, said in (("error", "failed"), ("skipped", "left out")):
            if key in line:
                yield f"- `{line['case']}` {said}: {line[key]}"


def tiny(lines: list[dict]) -> Iterator[str]:
    if not lines:
        return
    yield "| tiny model | ratios off by | resumes to the bit | LoRA's file off by, of the spread | LoRA tensors |"
    yield "|---|---|---|---|---|"
    for line in lines:
        exact = "yes" if line["resume_exact"] else f"no, {line['resume_off']:.1e}"
        yield (
            f"| {line['case'].removeprefix('tiny/')} | {line['ratio_deviation']:.1e} | {exact} | "
            f"{line['lora_off']:.1e} | {line['lora_tensors']} |"
        )
    yield ""


def sized(lines: list[dict]) -> Iterator[str]:
    if not lines:
        return
    yield (
        "| model | load, s | " + " | ".join(f"{phase}, s" for phase in PHASES) + " | rollout, GiB (computed) | "
        "update, GiB (computed) | decode, GiB (computed) | ratios off by | resumes to the bit | LoRA's file off by |"
    )
    yield f"|{'---|' * (7 + len(PHASES))}"
    for line in lines:
        seconds = " | ".join(f"{line['seconds'].get(phase, 0.0):.2f}" for phase in ("load", *PHASES))
        memory = " | ".join(beside(line, phase) for phase in ("rollout", "update", "decode"))
        exact = {True: "yes", False: f"no, {line.get('resume_off', 0):.1e}", None: ""}[line.get("resume_exact")]
        off = f"{line['lora_off']:.1e}" if "lora_off" in line else ""
        yield f"| {line['case']} | {seconds} | {memory} | {line['ratio_deviation']:.1e} | {exact} | {off} |"
    yield ""


def beside(line: dict, phase: str) -> str:
    """Measured and computed memory of a phase."""
    was, said = line["gib"].get(phase), line["computed_gib"].get(phase)
    if was is None or said is None:
        return "" if was is None else f"{was:.1f}"
    return f"{was:.1f} ({said:.1f}, {said / was - 1:+.0%})"


def orders(lines: list[dict]) -> Iterator[str]:
    if not lines:
        return
    yield (
        "| model | trainer, s per iteration | one by one, s | ratio | network passes per image, trainer and one by one "
        "| cosine of the gradients |"
    )
    yield "|---|---|---|---|---|---|"
    for line in lines:
        yield (
            f"| {line['case']} | {line['seconds']['total']:.2f} | {line['one_by_one']['total']:.2f} | "
            f"{line['ratio']:.2f} | {line['forwards_per_image']:.1f}, {line['one_by_one_forwards_per_image']:.1f} | "
            f"{line['gradient_cosine']:.6f} |"
        )
    yield ""
