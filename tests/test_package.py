"""The package as a whole: who imports whom, what importing costs, what its documents say."""

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastgt
from fastgt import versions

ROOT = Path(__file__).parent.parent

# layer -> the layers it may import; "triton" and "torch" only where listed or unrestricted
LAYERS = {
    "contract": set(),
    "shard": set(),
    "signature": set(),
    "extras": set(),
    "files": set(),
    "options": set(),
    "terminal": set(),
    "versions": set(),
    "reordering": {"extras"},
    "tiles": set(),
    "graph_build": {"cpu"},
    "graph_adjacency": {"graph_build"},
    "graph_hetero": {"graph_adjacency", "graph_build"},
    "graph_from_pyg": {"graph_adjacency", "graph_build", "graph_hetero"},
    "graph_order": {"graph_build", "reordering"},
    "plans": {"graph_build", "tiles"},
    "prepared": {"graph_build", "plans", "tiles"},
    "graph_pytree": {"graph", "graph_hetero"},  # what it registers, for a type checker
    "graph_storage": {"graph_build", "prepared"},
    "graph_plan": {"graph_build", "graph_storage", "plans", "prepared"},
    "graph_sample": {"cpu", "graph", "graph_build"},  # its result, for a type checker
    "graph_file": {
        "cpu",
        "files",
        "graph_build",
        "graph_hetero",
        "graph_order",
        "graph_plan",
        "prepared",
    },
    "graph": {
        "graph_build",
        "graph_file",
        "graph_from_pyg",
        "graph_hetero",
        "graph_order",
        "graph_pytree",
        "graph_sample",
        "plans",
        "prepared",
    },
    "distributed": {
        "contract",
        "cpu",
        "extras",
        "files",
        "graph",
        "graph_build",
        "ops",
        "options",
        "philox",
        "real_graphs",
        "reference",
        "reordering",
        "shard",
        "terminal",
    },
    "encodings": {"files", "graph", "ops", "plans"},
    "datasets": {"cpu", "encodings", "files", "graph", "ops", "philox", "real_graphs"},
    "philox": set(),
    "reference": {"contract", "graph", "philox"},
    "cpu": {"contract", "philox", "__init__"},  # the version
    "kernels": {"contract"},
    "ops": {
        "shard",
        "contract",
        "signature",
        "graph",
        "graph_build",
        "plans",
        "prepared",
        "tiles",
        "versions",
        "philox",
        "reference",
        "cpu",
        "kernels",
    },
    "nn": {"contract", "graph", "ops", "shard"},
    "pyg": {"contract", "graph", "nn", "ops"},
    "drop_in": {"pyg"},
    "pruning": {"contract", "graph", "ops", "nn"},
    "patterns": {"graph", "graph_build", "ops", "philox"},
    "models": {"contract", "graph", "encodings", "nn", "ops", "patterns", "pruning"},
    "drawn_graphs": {"files", "graph", "patterns"},
    "published": {"graph"},
    "real_graphs": {"graph"},
    "testing": {"drawn_graphs", "graph", "prepared", "published", "real_graphs", "tiles"},
    "bench": {
        "contract",
        "graph",
        "plans",
        "tiles",
        "reference",
        "ops",
        "kernels",
        "nn",
        "pyg",
        "models",
        "published",
        "real_graphs",
        "testing",
        "datasets",
        "distributed",
        "drawn_graphs",
        "training",
        "files",
        "options",
        "terminal",
        "__init__",
    },
    "demo": {"extras", "files", "graph", "ops", "nn", "models", "bench"},
    "training": {
        "distributed",
        "extras",
        "files",
        "options",
        "graph",
        "plans",
        "datasets",
        "encodings",
        "ops",
        "nn",
        "models",
        "pruning",
        "real_graphs",
        "shard",
        "terminal",
        "testing",
        "bench",
    },
    "doctor": {"cpu", "graph", "ops", "terminal", "__init__"},
    "cli": {
        "datasets",
        "options",
        "ops",
        "demo",
        "distributed",
        "training",
        "bench",
        "doctor",
        "terminal",
        "__init__",
    },
    "__main__": {"cli"},
    "data": set(),
    "__init__": {"contract", "drop_in", "graph", "ops", "encodings", "philox", "pruning"},
}
MODULES = [
    *(ROOT / "fastgt").rglob("*.py"),
    *(ROOT / "kernels").glob("*.py"),
    *(ROOT / "bench").glob("*.py"),
]


def layer_of(module: Path) -> str:
    parts = module.relative_to(ROOT).parts
    return parts[0] if parts[0] in ("kernels", "bench") else parts[1].removesuffix(".py")


def imported(tree: ast.AST):
    """-> (layer or package imported, whether inside a function)."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
            if node.module == "fastgt":
                # `from fastgt import reference` names a layer, `import Graph` a public name
                names = [
                    f"fastgt.{a.name}" if a.name in LAYERS else "fastgt.__init__"
                    for a in node.names
                ]
        else:
            continue
        for name in names:
            yield name, id(node) in inside


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_layers(module):
    layer = layer_of(module)
    for name, inside in imported(ast.parse(module.read_text())):
        package, _, rest = name.partition(".")
        if package == "triton":
            assert layer == "kernels" or inside, f"{name} at import time"
        if package != "fastgt":
            continue
        target = rest.partition(".")[0] or "__init__"
        assert target == layer or target in LAYERS[layer], f"{layer} imports {target}"
        if target == "kernels":
            assert inside, "kernels are imported inside functions only"


def test_every_module_is_in_a_layer():
    assert {layer_of(m) for m in MODULES} == set(LAYERS)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT.anchor,
        env=os.environ | environment,
    )


def test_all_but_fastgt_pyg_works_without_torch_geometric():
    code = (
        "import sys; sys.modules['torch_geometric'] = None\n"
        "import torch, fastgt.nn, fastgt.models, fastgt.pruning, fastgt.training, fastgt.testing\n"
        "import fastgt.bench.operators\n"
        "def tell(call):\n"
        "    try: call()\n"
        "    except ImportError as error: print(error)\n"
        "def imported(): import fastgt.pyg\n"
        "tell(imported)\n"
        "tell(lambda: fastgt.accelerate(torch.nn.Linear(2, 2)))\n"
    )
    run = run_python(code)
    said = 'fastgt.pyg needs torch-geometric, which is not installed: pip install "fastgt[pyg]"\n'
    assert run.stdout == 2 * said, run.stdout + run.stderr


def test_import_is_light():
    heavy = [
        "triton",
        "scipy",
        "matplotlib",
        "torch_geometric",
        "torch_scatter",
        "pymetis",
        "igraph",
        "rdkit",
    ]
    run = run_python(f"import sys, fastgt; print([m for m in {heavy} if m in sys.modules])")
    assert run.stdout == "[]\n", run.stdout + run.stderr


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from fastgt import Graph, neighborhood_attention as na\n"
        "g = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]))\n"
        "x = torch.randn(2, 1, 4)\n"
        "na(x, x, x, g)\n"
        "try: na(x, x, x, g, impl='triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    run = run_python(code)
    assert "needs the package triton" in run.stdout, run.stdout + run.stderr


def test_works_without_scipy_but_for_what_needs_it():
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "import torch, fastgt.nn, fastgt.testing\n"
        "from fastgt import Graph, neighborhood_attention as na\n"
        "g = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]])).reordered('degree')\n"
        "x = torch.randn(2, 1, 4)\n"
        "na(x, x, x, g)\n"
        "try: g.reordered('rcm')\n"
        "except ImportError as error: print(error)\n"
    )
    run = run_python(code)
    assert "scipy" in run.stdout, run.stdout + run.stderr


def test_triton_on_cpu_tensors_is_refused_without_the_interpreter():
    code = (
        "import torch; from fastgt import Graph, neighborhood_attention as na\n"
        "g = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]))\n"
        "x = torch.randn(2, 1, 4)\n"
        "try: na(x, x, x, g, impl='triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    run = run_python(code, TRITON_INTERPRET="0")
    assert "needs tensors on a GPU, got cpu" in run.stdout, run.stdout + run.stderr


ATTEND = (
    "import torch; from fastgt import Graph, neighborhood_attention as na\n"
    "g = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]))\n"
    "x = torch.randn(2, 1, 4)\n"
)


@pytest.mark.parametrize(
    ("package", "version", "range_"),
    [
        ("torch", "2.10.1", "2.11 to 2.15"),
        ("torch", "1.13.0+cu117", "2.11 to 2.15"),
        ("triton", "3.5.1", "3.6 to 3.9"),
    ],
)
def test_an_older_version_is_refused_by_the_first_call(package, version, range_):
    code = (
        f"import {package}; {package}.__version__ = {version!r}\n{ATTEND}"
        "print('imported')\n"
        f"impl = {'triton' if package == 'triton' else None!r}\n"
        "for _ in range(2):\n"
        "    try: na(x, x, x, g, impl=impl)\n"
        "    except RuntimeError as error: print(error)\n"
    )
    run = run_python(code)
    said = f"fastgt supports {package} {range_}, and {version} is installed"
    assert run.stdout.startswith("imported\n"), run.stdout + run.stderr
    assert run.stdout.count(said) == 2, run.stdout + run.stderr


@pytest.mark.parametrize(("package", "version"), [("torch", "2.16.0a0+git"), ("triton", "4.0.0")])
def test_a_newer_version_works_and_warns_once(package, version):
    pytest.importorskip(package)
    code = (
        f"import {package}; {package}.__version__ = {version!r}\n{ATTEND}"
        f"impl = {'triton' if package == 'triton' else None!r}\n"
        "for _ in range(2): print(na(x, x, x, g, impl=impl).shape)\n"
    )
    run = run_python(code, TRITON_INTERPRET="1")
    assert run.stdout.count("torch.Size([2, 1, 4])") == 2, run.stdout + run.stderr
    assert run.stderr.count(f"and {version} is installed: fastgt was not tested with it") == 1


def test_the_declared_versions_are_those_that_are_tested_and_stated():
    """pyproject.toml, the check at run time, README's line and the files of the matrix."""
    declared = dict(
        re.findall(r'"(torch|triton|numpy|scipy)>=([\d.]+),<[\d.]+', _text("pyproject.toml"))
    )
    assert len(declared) == 4
    lowest, highest = (
        dict(re.findall(r"^(\w+)==([\d.]+)", _text(f"tests/matrix/{name}.txt"), re.MULTILINE))
        for name in ("lowest", "highest")
    )
    for package, least in declared.items():
        assert lowest[package].startswith(f"{least}."), package
        bound = re.search(rf'"{package}>=[\d.]+,<([\d.]+)', _text("pyproject.toml"))[1]
        low, high = ([int(n) for n in x[package].split(".")] for x in (lowest, highest))
        assert low < high < [int(n) for n in bound.split(".")]
    for package, (low, high) in versions.SUPPORTED.items():
        assert declared[package] == low
        assert highest[package].startswith(f"{high}.")
        assert f"{package} {low} to {high}" in _text("README.md").replace("\n", " ")


def _text(name: str) -> str:
    return (ROOT / name).read_text()


def test_kernels_refuse_their_folder_name():
    run = subprocess.run(
        [sys.executable, "-c", "import kernels"], capture_output=True, text=True, cwd=ROOT
    )
    assert "fastgt.kernels" in run.stderr


# modules whose examples import torch-geometric
OF_PYG = [
    "fastgt.datasets.from_pyg",
    "fastgt.drop_in",
    "fastgt.pyg",
    "fastgt.pyg.fused",
    "fastgt.pyg.gat_conv",
    "fastgt.pyg.gine_conv",
    "fastgt.pyg.gps_conv",
    "fastgt.pyg.hgt_conv",
    "fastgt.pyg.linear_attention",
    "fastgt.pyg.point_transformer_conv",
    "fastgt.pyg.res_gated_graph_conv",
    "fastgt.pyg.sharing",
    "fastgt.pyg.transformer_conv",
]


def test_every_layer_of_pyg_has_examples_that_run():
    there = {f"fastgt.pyg.{path.stem}" for path in (ROOT / "fastgt" / "pyg").glob("*_conv.py")}
    assert there <= set(OF_PYG)


@pytest.mark.parametrize(
    "module",
    [
        "fastgt.datasets.block_file",
        "fastgt.datasets.block_models",
        "fastgt.datasets.event_set",
        "fastgt.datasets.graph_set",
        "fastgt.datasets.line_drawings",
        "fastgt.datasets.hop_features",
        "fastgt.datasets.named",
        "fastgt.datasets.node_set",
        "fastgt.datasets.sampled_tokens",
        "fastgt.datasets.token_set",
        "fastgt.distributed.checkpoint",
        "fastgt.distributed.edge_list",
        "fastgt.distributed.in_turn",
        "fastgt.distributed.group",
        "fastgt.distributed.partition",
        "fastgt.distributed.partition_files",
        "fastgt.distributed.pyg_partition",
        "fastgt.distributed.report",
        "fastgt.encodings.cache",
        "fastgt.encodings.electrostatic",
        "fastgt.encodings.heat_kernel",
        "fastgt.encodings.laplacian",
        "fastgt.encodings.paths",
        "fastgt.encodings.random_projection",
        "fastgt.encodings.random_walk",
        "fastgt.encodings.singular_vectors",
        "fastgt.graph",
        "fastgt.graph_file",
        "fastgt.graph_plan",
        "fastgt.graph_pytree",
        "fastgt.models.authors_checkpoints",
        "fastgt.models.correspondence",
        "fastgt.models.correspondence_checkpoints",
        "fastgt.models.correspondence_matching",
        "fastgt.models.deepsets",
        "fastgt.models.exphormer",
        "fastgt.models.exphormer_graph",
        "fastgt.models.graph_classifier",
        "fastgt.models.graph_gps",
        "fastgt.models.graph_gps_bigbird",
        "fastgt.models.graph_gps_checkpoints",
        "fastgt.models.graph_gps_layer",
        "fastgt.models.graph_gps_sign_net",
        "fastgt.models.graph_transformer",
        "fastgt.models.graphormer",
        "fastgt.models.gtsp",
        "fastgt.models.gtsp_attention",
        "fastgt.models.large_gt",
        "fastgt.models.mpnn_vn",
        "fastgt.models.open_graph",
        "fastgt.models.open_graph_checkpoints",
        "fastgt.models.open_graph_tasks",
        "fastgt.models.polynormer",
        "fastgt.models.polynormer_checkpoints",
        "fastgt.models.san",
        "fastgt.models.scene_graph",
        "fastgt.models.sgformer",
        "fastgt.models.sinkhorn",
        "fastgt.models.spectral_encoder",
        "fastgt.models.todyformer",
        "fastgt.models.todyformer_block",
        "fastgt.nn.attention",
        "fastgt.nn.head_gate",
        "fastgt.nn.linear_attention",
        "fastgt.nn.virtual_node",
        "fastgt.ops.additive_attention",
        "fastgt.ops.aggregate",
        "fastgt.ops.attention",
        "fastgt.ops.channelwise_attention",
        "fastgt.ops.gated_aggregate",
        "fastgt.ops.head_projection",
        "fastgt.ops.implementation",
        "fastgt.ops.linear_attention",
        "fastgt.ops.segment_pool",
        "fastgt.ops.segment_softmax",
        "fastgt.patterns.big_bird",
        "fastgt.patterns.chosen",
        "fastgt.patterns.drawn",
        "fastgt.patterns.grids",
        "fastgt.patterns.groups",
        "fastgt.patterns.heads",
        "fastgt.patterns.points",
        "fastgt.patterns.sequences",
        "fastgt.patterns.tokens",
        "fastgt.pruning.heads",
        "fastgt.pruning.layers",
        "fastgt.pruning.tokens",
        "fastgt.pruning.weights",
        "fastgt.reordering",
        "fastgt.terminal",
        "fastgt.testing",
        "fastgt.training.optimization",
        "fastgt.training.scores",
        "fastgt.training.settings",
        *OF_PYG,
    ],
)
def test_docstring_examples(module):
    if module in OF_PYG:
        pytest.importorskip("torch_geometric")
    found = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert found.attempted, f"{module} has no example"
    assert not found.failed


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("document", [page for page in PAGES if "```python" in _text(page)])
def test_code_of_documents_runs(document, tmp_path, monkeypatch):
    pytest.importorskip("torch_geometric")  # of which a block accelerates a model
    monkeypatch.chdir(tmp_path)  # blocks write files
    blocks = re.findall(r"```python\n(.*?)```", _text(document), re.DOTALL)
    names = {"__name__": "document"}  # one session: a block uses what those above it made
    for block in blocks:
        exec(compile(block, document, "exec"), names)


@pytest.mark.parametrize("document", PAGES)
def test_figures_of_documents_are_those_of_the_result_files(document):
    import render

    text = _text(document)
    assert render.rendered(text) == text, "run `python tools/render.py`"


def test_the_readme_is_one_page():
    assert len(_text("README.md").splitlines()) <= 150


def test_the_reference_has_every_public_name():
    """Each page of docs/api has all that its package exports."""
    told = {
        name
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    }
    for package in (
        "",
        ".nn",
        ".models",
        ".encodings",
        ".pruning",
        ".patterns",
        ".datasets",
        ".distributed",
    ):
        module = importlib.import_module(f"fastgt{package}")
        assert {f"fastgt{package}.{name}" for name in module.__all__} <= told, package


def test_packages_export_what_they_import():
    """A second list of names would hide those of the first from ``import *``."""
    for path in (ROOT / "fastgt").rglob("__init__.py"):
        body = ast.parse(path.read_text()).body
        lists = [
            ast.literal_eval(node.value)
            for node in body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        ]
        assert len(lists) <= 1, path
        imported = {
            name.asname or name.name
            for node in body
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastgt")
            for name in node.names
        }
        public = {name for name in imported if not name.startswith("_")}
        for names in lists:
            assert not public - set(names), path


def test_public_names_have_docstrings():
    for name in fastgt.__all__:
        assert getattr(fastgt, name).__doc__, name


def test_make_check_runs_every_operator():
    """tests/test_versions.py has all of them, and says so in a test of its own."""
    checked = re.search(r"^CHECKED = ((?:.*\\\n)*.*)", _text("Makefile"), re.MULTILINE)[1]
    for name in ("test_values_and_gradients", "test_every_public_operator_is_here"):
        assert f"tests/test_versions.py::{name}" in checked
        assert f"def {name}(" in _text("tests/test_versions.py")


def test_a_test_has_the_same_name_in_every_process(request):
    """pytest-xdist refuses a suite whose names differ, as names with an object's address do."""
    addresses = [item.nodeid for item in request.session.items if " at 0x" in item.nodeid]
    assert not addresses


# what a reader can hold: none of these numbers may grow
MOST_PARAMETERS = {"fastgt": 16, "bench": 16, "kernels": 20}
MOST_UNFORMATTED = {"fastgt": 0, "kernels": 0}  # "fmt: skip"
LONGEST_FILE = {"fastgt": 450, "kernels": 450, "bench": 450, "tests": 700}


def _sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _parameters(folder: str) -> Iterator[tuple[int, str]]:
    """-> (how many parameters, place) of every function but the public ones."""
    for path in _sources(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            name = getattr(node, "name", "lambda")
            if folder == "fastgt" and name in fastgt.__all__:
                continue
            a = node.args
            count = len(
                [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            )
            yield count, f"{path.relative_to(ROOT)}:{node.lineno} {name}"


@pytest.mark.parametrize("folder", MOST_PARAMETERS)
def test_no_function_has_more_parameters_than_a_reader_can_hold(folder):
    most, limit = max(_parameters(folder)), MOST_PARAMETERS[folder]
    print(f"{folder}: at most {most[0]} parameters ({most[1]}), {limit} allowed")
    over = [f"{place} has {n} parameters" for n, place in _parameters(folder) if n > limit]
    assert not over, f"more than {limit} in {folder}/: {'; '.join(over)}"


@pytest.mark.parametrize("folder", MOST_UNFORMATTED)
def test_code_is_formatted(folder):
    skips = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in _sources(folder)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"# fmt: (skip|off)", line)
    ]
    limit = MOST_UNFORMATTED[folder]
    print(f"{folder}: {len(skips)} lines are not formatted, {limit} allowed")
    assert len(skips) <= limit, f"{len(skips)} of at most {limit} in {folder}/: {', '.join(skips)}"


@pytest.mark.parametrize("folder", LONGEST_FILE)
def test_no_file_is_longer_than_a_reader_can_hold(folder):
    lengths = {path: len(path.read_text().splitlines()) for path in _sources(folder)}
    limit, longest = LONGEST_FILE[folder], max(lengths, key=lengths.__getitem__)
    print(f"{folder}: at most {lengths[longest]} lines ({longest.name}), {limit} allowed")
    over = [f"{p.relative_to(ROOT)} has {n} lines" for p, n in lengths.items() if n > limit]
    assert not over, f"more than {limit} in {folder}/: {'; '.join(over)}"
