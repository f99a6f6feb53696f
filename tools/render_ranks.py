"""Tables of docs/distributed.md from the rows of ``fastgt.bench.distributed``."""

from __future__ import annotations

from render_cells import Rows, machine

MOST_X = 0.65  # of the memory of one process, that each of two ranks may take
SHOWN = (8, 64, 512, 1024)  # ranks of a simulation


def of_kind(kind: str, rows: Rows) -> str:
    """The table of ``measured``, ``partition`` or ``simulated``."""
    mine = [row for row in rows if row["kind"] == kind]
    return TABLES[kind](mine) if mine else "Nothing has been measured."


def _measured(rows: Rows) -> str:
    """Steps of training on this machine."""
    first = rows[0]
    lines = [
        f"`{first['problem']}`, {first['rows']:,} nodes, {first['edges']:,} edges; "
        f"GraphTransformer of {first['layers']} layers, {first['heads']} heads, "
        f"{first['dim']} channels; float32; {machine(rows)}",
        "",
        "| ranks x threads | overlap | a step | peak memory of a rank | target | with glibc's "
        "defaults | bytes sent in a step | by the formula |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        several = row["parts"] > 1
        cells = [f"{row['parts']} x {row['threads']}", "", f"{row['step_s']:.3f} s"]
        cells += [f"{row['peak_bytes'] / 1e6:.0f} MB", ""]
        cells += [f"{row['kept_bytes'] / 1e6:.0f} MB", "", ""]
        if several:
            cells[1] = "on" if row["overlap"] else "off"
            cells[2] += f" ({row['step_x']:.2f}x)"
            cells[3] += f" ({row['peak_x']:.0%})"
            met = "met" if row["peak_x"] <= MOST_X else "missed"
            cells[4] = f"at most {MOST_X:.0%}: {met}"
            cells[6:] = f"{row['sent_bytes']:,}", f"{row['formula_bytes']:,}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _partition(rows: Rows) -> str:
    """What methods cut, and how long they take."""
    first = rows[0]
    lines = [
        f"`{first['problem']}`, {first['rows']:,} nodes, {first['edges']:,} edges; {machine(rows)}",
        "",
        "| ranks | method | halo of all ranks | of one, at most | cut edges | most edges by mean "
        "| most rows by mean | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            str(row["parts"]),
            row["method"],
            f"{row['halo']:,}",
            f"{row['halo_most']:,}",
            f"{row['cut']:.1%}",
            f"{row['balance']:.2f}",
            f"{row['balance_rows']:.2f}",
            f"{row['partition_s']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _simulated(rows: Rows) -> str:
    """Steps that nobody ran."""
    devices = list(dict.fromkeys((row["rates"], row["network"], row["source"]) for row in rows))
    lines = [
        "Simulated. " + "; ".join(f"{name} with {net}: {source}" for name, net, source in devices),
        "",
        machine(rows),
        "",
        f"| graph | scaling | ranks | method | most halo | "
        f"{' | '.join(f'{name}: a step, efficiency' for name, _, _ in devices)} |",
        f"|---|---|---|---|---|{'---|' * len(devices)}",
    ]
    places = dict.fromkeys(
        (row["problem"], row["scaling"], row["parts"], row["method"]) for row in rows
    )
    for place in places:
        problem, scaling, parts, method = place
        if scaling == "strong" and parts not in SHOWN:
            continue
        found = {
            row["rates"]: row
            for row in rows
            if (row["problem"], row["scaling"], row["parts"], row["method"]) == place
        }
        halo = next(iter(found.values()))["halo_most"]
        cells = [f"`{problem}`", scaling, str(parts), method, f"{halo:,}"]
        for name, _, _ in devices:
            row = found[name]
            cells.append(f"{row['step_s'] * 1e3:.3g} ms, {row['efficiency']:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"measured": _measured, "partition": _partition, "simulated": _simulated}
