"""The picture of the README: attention beside torch-geometric's, in time and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures import png
from render_cells import Rows

from fastgt import files

GRAPHS = {
    "zinc": "molecules\n(ZINC)",
    "cora": "citations\n(Cora)",
    "pattern": "block models\n(PATTERN)",
    "debian": "packages\n(Debian)",
    "amazon_computers": "products\n(Amazon)",
    "tolokers": "workers\n(Tolokers)",
}
PEERS = {"pyg": "torch-geometric", "pyg, compiled": "torch-geometric, compiled"}


def front(rows: Rows, path: Path) -> Path:
    """Draw how many times as long, and as much memory, a training step takes with each peer."""
    from matplotlib.figure import Figure

    found = {(row["problem"], row["provider"]): row for row in rows if _is_usual(row)}
    names = [name for name in GRAPHS if all((name, p) in found for p in ("fastgt", *PEERS))]
    figure = Figure(figsize=(4.4, 3.8), layout="constrained")  # a phone shows its letters too
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, factor) in zip(panels, _FACTORS.items(), strict=True):
        for i, (peer, label) in enumerate(PEERS.items()):
            values = [factor(found[name, peer], found[name, "fastgt"]) for name in names]
            places = [j + 0.2 - 0.4 * i for j in range(len(names))]
            bars = axes.barh(places, values, 0.38, color=f"C{i}", label=label)
            axes.bar_label(
                bars,
                [f"{x:.0f}x" if x >= 10 else f"{x:.1f}x" for x in values],
                padding=2,
                fontsize=8,
            )
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(title, fontsize=9)
        axes.margins(x=0.22)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), [GRAPHS[name] for name in names])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, png(figure, 160))
    return path


_FACTORS = {
    "time of a training step,\nfastgt = 1": lambda peer, _: peer["both_x"],
    "its memory,\nfastgt = 1": lambda peer, ours: peer["both_peak_bytes"] / ours["both_peak_bytes"],
}


def _is_usual(row: dict[str, Any]) -> bool:
    shape = row.get("heads"), row.get("width"), row.get("dtype")
    return row.get("operator") == "attention" and row["match"] and shape == (8, 16, "float32")
