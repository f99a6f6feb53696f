"""What is made of rows of results: tables, targets, plots, and the README."""

import json
import subprocess

import pytest
import render
import trainings

from fastgt.bench import harness, plots, table, targets

MACHINE = {
    "device": "a CPU, 2 threads",
    "commit": "abc",
    "date": "2026-11-25",
    "torch": "2.13.0",
}


def row(operator, problem, provider, factor=1.0, **more):
    ours = 0.5
    made = {
        "operator": operator,
        "problem": problem,
        "rows": 40,
        "edges": 200,
        "graphs": 1,
        "heads": 8,
        "width": 16,
        "dtype": "float32",
        "provider": provider,
        "match": True,
        "forward_peak_bytes": 1e6 * factor,
        "both_peak_bytes": 3e6 * factor,
        "copy_bytes_per_s": 1e10,
        "matmul_flops_per_s": 1e11,
    }
    for part in ("forward", "backward", "both"):
        made |= {
            f"{part}_s": ours * factor,
            f"{part}_x": factor,
            f"{part}_spread": 0.01,
            f"{part}_bytes_per_s": 2e9 / factor,
            f"{part}_flops_per_s": 1e9 / factor,
            f"{part}_flops_per_byte": 0.5,
            f"{part}_roofline": 0.25 / factor,
        }
    return made | MACHINE | more


def rows():
    return [
        row("attention", "power_law", "fastgt"),
        row("attention", "power_law", "pyg", 4.5),
        row("attention", "power_law", "pyg, compiled", 1.5),
        row("attention", "cora", "fastgt", rows=50, edges=900),
        row("attention", "cora", "pyg", 2.5, rows=50, edges=900),
        row("attention", "cora", "fastgt", width=8),
        row("attention", "cora", "pyg", 9.5, width=8),
        row("masked_heads", "power_law", "no gate"),
        row("masked_heads", "power_law", "1 of 8", 0.2),
        row("masked_heads", "power_law", "2 of 8", 0.4),
        row("gine", "zinc", "fastgt"),
        row("gine", "zinc", "pyg", 0.5),
    ]


@pytest.fixture
def results(tmp_path, monkeypatch):
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    (folder / "cpu.json").write_text(json.dumps(rows()))
    monkeypatch.setattr(render, "RESULTS", folder)
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setattr(render, "PLOTS", tmp_path / "docs" / "figures" / "plots")
    return folder


def test_targets_are_told_met_or_missed():
    told = list(targets.lines(rows(), "cpu"))
    assert "met: attention, power_law, pyg, both_x: 4.5, target >= 4" in told
    assert "MISSED: attention, power_law, pyg, memory_x: 4.5, target >= 5" in told
    assert "met: masked_heads, power_law, 1 of 8, forward_x: 0.2, target <= 0.225" in told
    assert "MISSED: masked_heads, power_law, 2 of 8, both_x: 0.4, target <= 0.35" in told
    assert not any("transformer_conv" in line for line in told)  # it was not run


def test_a_target_of_all_problems_is_held_against_the_farthest():
    found = [
        row("attention", problem, provider, factor)
        for problem, factors in (("cora", (12, 5)), ("debian", (30, 2.5)))
        for provider, factor in zip(("pyg", "pyg, compiled"), factors, strict=True)
    ]
    assert list(targets.lines(found, "cuda")) == [
        "met: attention, cora, pyg, both_x: 12, target >= 10",
        "MISSED: attention, debian, pyg, compiled, both_x: 2.5, target >= 3",
    ]


def test_a_table_says_what_was_not_timed_and_what_spread():
    made = [
        row("attention", "cora", "fastgt"),
        row("attention", "cora", "pyg", 2.0, both_spread=0.2),
        row("attention", "cora", "wrong") | {"match": False, "error": "output is off\nby much"},
        row("attention", "cora", "absent") | {"match": None, "error": "not installed"},
    ]
    lines = table.table(made).splitlines()
    assert lines[1].split() == [
        *("fastgt", "500.00", "(1.00x)", "500.00", "(1.00x)", "500.00", "(1.00x)", "1.0/3.0"),
        *("2.0", "25%"),
    ]
    assert lines[3] == "wrong  MISMATCH: output is off"
    assert lines[4] == "absent not installed"
    assert lines[5] == "  pyg: times spread, of their median, by both 20%"
    assert len(lines) == 6


def test_a_table_tells_wall_kernel_and_replay_times_of_a_gpu():
    gpu = {"forward_wall_s": 2e-3, "forward_kernel_s": 1e-3, "forward_replay_s": 1.5e-3}
    both = {"both_wall_s": 2e-3, "both_kernel_s": 1e-3, "both_replay_error": "not captured"}
    text = table.table([row("attention", "cora", "fastgt") | gpu | both])
    assert "forward: wall 2.000 ms, kernels 1.000 ms, graph replay 1.500 ms" in text
    assert "both: wall 2.000 ms, kernels 1.000 ms, graph replay not captured" in text


def test_every_marker_is_filled_from_its_file(results):
    markers = [
        "table cpu attention power_law",
        "overview cpu attention pyg; pyg, compiled",
        "operators cpu",
        "targets cpu",
        "table cpu masked_heads",
        "devices",
    ]
    readme = "".join(f"before\n<!-- {m} -->\nold\n<!-- end -->\n" for m in markers) + "after"
    text = render.rendered(readme)
    assert "old" not in text
    assert text.count("before") == len(markers)
    assert text.endswith("after")
    assert render.rendered(text) == text
    parts = text.split("before\n")[1:]
    assert "| pyg | yes | 2250 ms (4.5x) |" in parts[0]
    assert "`cora`" not in parts[0]
    assert "| `cora` | 50 | 900 | 500 ms | 500 ms | 2.5x / 2.5x | - | 2x |" in parts[1]
    assert "9.5" not in parts[1]  # of each problem the heads it was measured with first
    assert "| gine | `zinc` | 500 ms | 500 ms | pyg 0.5x / 0.5x | 0.5x |" in parts[2]
    assert "attention" not in parts[2].replace("<!-- operators cpu -->", "")
    assert "| attention | `power_law` | pyg, memory | 4.50x | at least 5x | missed |" in parts[3]
    assert "| 2 of 8 | yes | 200 ms (0.40x) | 200 ms (0.40x) | 0 / 1 MB |" in parts[4]
    assert "No GPU has been measured." in parts[5]


def training(model, test, seed=0, **more):
    return {
        "title": "ZINC-12k, substitute train",
        "settings": {"model": model, "data": "zinc12k", "seed": seed},
        "metric": "mae",
        "test": test,
        "epochs": 40,
        "epoch_s": 9.5,
        "peak_bytes": 5e8,
        "parameters": 588_929,
        "published": {"value": 0.226, "deviation": 0.014, "source": "A paper"},
        "device": "a CPU, 2 threads",
        "torch": "2.13.0",
        "date": "2026-11-29",
        "commit": "abc",
    } | more


def test_trainings_stand_beside_what_was_published(results):
    pruned = training("a", 0.4, way="heads", options="--set prune=heads:0.5")
    old = [training("a", 0.9, options="--hours 1"), training("b", 0.5, options=""), pruned]
    found = [training("a", x, seed, options="--seeds 1-2") for x, seed in ((0.25, 1), (0.29, 2))]
    kept = trainings.merged(trainings.merged([], old), found)
    assert [x["test"] for x in kept] == [0.25, 0.29, 0.4, 0.5]
    (results / "trainings.json").write_text(json.dumps(kept))
    lines = render.rendered("<!-- trainings -->\n<!-- end -->").splitlines()
    assert "| `a` | ZINC-12k, substitute train | mae | 0.2700 ± 0.0283 |" in lines[5]
    assert "| 0.2260 ± 0.0140 (A paper) | 2 | 40 | 9.5 s | 500 MB | 588,929 |" in lines[5]
    assert lines[5].endswith("| `a zinc12k --seeds 1-2` |")
    assert "| mae | 0.4000 |" in lines[6]
    assert lines[6].endswith("| `a zinc12k --set prune=heads:0.5` |")
    assert "| mae | 0.5000 |" in lines[7]
    assert lines[7].endswith("| `b zinc12k` |")
    (results / "trainings.json").unlink()
    assert "No training has been run" in render.rendered("<!-- trainings -->\n<!-- end -->")


def test_a_commit_is_dirty_by_its_code_alone(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    results, code = tmp_path / "bench" / "results" / "cpu.json", tmp_path / "bench" / "harness.py"
    results.parent.mkdir(parents=True)
    assert harness.commit(tmp_path) == harness.UNKNOWN
    for file in (results, code):
        file.write_text("[]")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "One"]):
        subprocess.run([*git, *command], check=True)
    name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    results.write_text("[1]")
    assert name.startswith(harness.commit(code.parent))
    code.write_text("x = 1")
    assert harness.commit(code.parent).endswith("-dirty")
    subprocess.run([*git, "add", "."], check=True)
    assert harness.commit(code.parent).endswith("-dirty")


def test_a_gpu_s_results_get_a_part_of_their_own(results):
    found = [dict(x, device="NVIDIA H100") for x in rows() if x["operator"] == "attention"]
    (results / "nvidia-h100.json").write_text(json.dumps(found))
    text = render.rendered("<!-- devices -->\n<!-- end -->")
    assert "**NVIDIA H100**" in text
    assert "| attention | `cora` | pyg, both | 2.50x | at least 10x | missed |" in text
    assert "| `power_law` | 40 | 200 | 500 ms | 500 ms | 4.5x / 4.5x | 1.5x / 1.5x | 4x |" in text


def test_providers_that_were_not_timed_are_in_the_readme(results):
    found = [
        row("attention", "cora", "fastgt"),
        row("attention", "cora", "pyg") | {"match": False, "error": "off"},
        {
            x: y
            for x, y in row("attention", "cora", "flex attention").items()
            if not x.startswith(("both", "backward"))
        },
    ]
    (results / "cpu.json").write_text(json.dumps(found))
    text = render.rendered("<!-- table cpu attention -->\n<!-- end -->")
    assert "| pyg | no | off | | | | |" in text
    assert "| flex attention | yes | 500 ms (1.0x) |  |  | 1 /  MB | 25.0% |" in text
    text = render.rendered("<!-- overview cpu attention flex attention; pyg -->\n<!-- end -->")
    assert "| 1.0x / - | no |" in text


def test_every_commit_and_spread_is_named(results):
    found = [
        row("attention", "cora", "fastgt"),
        row("attention", "cora", "pyg", 2.0, both_spread=0.3, commit="def"),
    ]
    (results / "cpu.json").write_text(json.dumps(found))
    text = render.rendered("<!-- table cpu attention -->\n<!-- end -->")
    assert "commit abc, def." in text
    assert "| 1000 ms (2.0x) | 1000 ms (2.0x) | ~1000 ms (2.0x) |" in text
    text = render.rendered("<!-- overview cpu attention pyg -->\n<!-- end -->")
    assert "| 2.0x / ~2.0x |" in text


def test_a_second_dtype_is_left_out(results):
    wide = [row("attention", "cora", "fastgt"), row("attention", "cora", "pyg", 3.0)]
    narrow = [dict(x, dtype="bfloat16") for x in (wide[0], row("attention", "cora", "pyg", 20.0))]
    (results / "cpu.json").write_text(json.dumps(narrow + wide))
    text = render.rendered("<!-- overview cpu attention pyg -->\n<!-- end -->")
    assert "bfloat16" in text
    assert "20.0x" in text
    assert "3.0x" not in text
    assert render.rendered("<!-- table cpu attention -->\n<!-- end -->").count("| yes |") == 2
    assert "MISSED: attention, cora, pyg, both_x: 3" not in " ".join(
        targets.lines(narrow + wide, "cuda")
    )


def test_a_fastgt_that_failed_leaves_the_tables_whole(results, tmp_path):
    failed = {
        x: y
        for x, y in row("attention", "cora", "fastgt").items()
        if not x.startswith(("forward", "backward", "both"))
    }
    failed |= {"match": None, "error": "no room"}
    peer = {x: y for x, y in row("attention", "cora", "pyg").items() if not x.endswith("_x")}
    found = [failed, peer, dict(failed, operator="gine"), dict(peer, operator="gine")]
    (results / "cpu.json").write_text(json.dumps(found))
    for marker in ("table cpu attention", "overview cpu attention pyg", "operators cpu"):
        assert "500 ms" in render.rendered(f"<!-- {marker} -->\n<!-- end -->") or "- | -" in (
            render.rendered(f"<!-- {marker} -->\n<!-- end -->")
        )
    pytest.importorskip("matplotlib")
    kinds = {path.stem for path in plots.plot(found, tmp_path / "plots")}
    assert not any("speedup" in kind for kind in kinds)


def test_what_the_host_pays_is_met_or_missed(results):
    found = [
        {"call": call, "microseconds": us, "target": "sm_90", "triton": "3.7.1"} | MACHINE
        for call, us in (("forward", 44.5), ("forward, no_grad", 36.9), ("forward and backward", 9))
    ]
    (results / "launch.json").write_text(json.dumps(found))
    text = render.rendered("<!-- table launch -->\n<!-- end -->")
    assert "| forward | 44.5 | at most 40 | missed |" in text
    assert "| forward, no_grad | 36.9 | at most 40 | met |" in text
    assert "| forward and backward | 9.0 |  |  |" in text


def test_rendering_a_checkout_rewrites_the_readme_and_draws(results, capsys):
    pytest.importorskip("matplotlib")
    readme = results.parents[1] / "README.md"
    readme.write_text("<!-- targets cpu -->\n<!-- end -->\n")
    render.run()
    assert "| missed |" in readme.read_text()
    drawn = {path.name for path in (render.PLOTS / "cpu").iterdir()}
    assert {"attention-speedup.png", "attention-memory.svg", "attention-roofline.png"} <= drawn


def test_plots_are_drawn_where_rows_are_enough_for_them(tmp_path):
    pytest.importorskip("matplotlib")
    grown = [
        row("attention", problem, provider, factor * edges / 1e5, rows=edges // 16, edges=edges)
        for problem, edges in (("rmat_11", 25_000), ("rmat_13", 110_000), ("rmat", 470_000))
        for provider, factor in (("fastgt", 1), ("pyg", 4))
    ]
    made = plots.plot(rows() + grown, tmp_path / "new")
    kinds = {path.stem for path in made}
    assert kinds == {
        "attention-speedup",
        "attention-shapes",
        "attention-memory",
        "attention-roofline",
        "attention-scaling-nodes",
        "masked_heads-speedup",
        "masked_heads-roofline",
        "gine-speedup",
        "gine-roofline",
    }
    again = plots.plot(rows() + grown, tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in made]
    for path in made:
        start = path.read_bytes()[:5]
        assert start == (b"\x89PNG\r" if path.suffix == ".png" else b"<?xml")
    # who was not timed is not drawn
    alone = [row("attention", "cora", "fastgt"), row("attention", "cora", "pyg", match=False)]
    kinds = {path.stem for path in plots.plot(alone, tmp_path / "alone")}
    assert kinds == {"attention-roofline"}


def test_what_is_drawn_is_what_the_rows_say():
    pytest.importorskip("matplotlib")
    mine = [x for x in rows() if x["operator"] == "attention"]
    colours = dict.fromkeys(("fastgt", "pyg", "pyg, compiled"), "C0")
    axes = plots._speed_ups("attention", mine, colours).axes[0]
    ends = [bar.get_y() + bar.get_height() for bar in axes.patches]
    assert sorted(end for end in ends if end == end) == [1.5, 2.5, 4.5, 9.5]
    labels = [x.get_text() for x in axes.get_xticklabels()]
    assert labels == ["power_law 8x16", "cora 8x16", "cora 8x8"]
    shapes = dict(plots._figures("attention", mine, mine))
    for kind, expected in (
        ("speedup", ["power_law", "cora"]),
        ("shapes", ["cora 8x16", "cora 8x8"]),
    ):
        ticks = shapes[kind].axes[0].get_xticklabels()
        assert [x.get_text() for x in ticks] == expected
    grown = [row("attention", "rmat", "fastgt", rows=10), row("attention", "rmat_11", "fastgt", 2)]
    line = plots._scaling("attention", grown, "nodes", colours).axes[0].lines[0]
    assert list(line.get_xdata()) == [10, 40]
    assert list(line.get_ydata()) == [500, 1000]
    roof = plots._roofline("attention", mine, colours).axes[0].lines[-1]
    assert list(roof.get_ydata()) == [2.5, 10.0]  # GFLOP/s at a quarter and at one operation a byte


def test_rows_of_several_devices_are_not_drawn_together(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="several devices"):
        plots.plot([*rows(), row("attention", "cora", "pyg", device="another")], tmp_path)
