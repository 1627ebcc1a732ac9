"""What keeps the scripts readable: sizes, sections, order, imports, seams; and what requirements.txt has to list.

Each rule is a function that returns what breaks it. Each has a test on a made-up bad example, so that it can fail.
"""

import ast
import importlib.metadata
import re
import statistics
import sys

import pytest
from harness import ROOT

MAX_LINES = {
    "train_sdxl_lora.py": 3100,
    "sdxl_data.py": 1700,
    "sdxl_single_file.py": 600,
    "sdxl_lora.py": 600,
    "sdxl_speed.py": 400,
    "sdxl_memory.py": 400,
    "sdxl_preview.py": 400,
    "evaluate.py": 1400,
    "hpo_sweep.py": 1400,
}
MAX_FUNCTION, MAX_MEDIAN, MAX_NESTING, MAX_TEST_FILE = 70, 12, 5, 600
SECTIONS = [
    *("Arguments", "Models and LoRA", "Data", "Encoding", "Loss", "Optimizer", "Checkpoints", "Validation"),
    *("Train loop", "Preview", "Process, log, errors", "Main"),
]
PARTS = {"sdxl_data", "sdxl_single_file", "sdxl_lora", "sdxl_speed", "sdxl_memory", "sdxl_preview"}
MAY_IMPORT = {
    "sdxl_data": set(),
    "sdxl_single_file": {"sdxl_data"},
    "sdxl_lora": {"sdxl_data", "sdxl_single_file"},
    "sdxl_speed": {"sdxl_data", "sdxl_single_file"},
    "sdxl_memory": {"sdxl_data", "sdxl_speed"},
    "sdxl_preview": {"sdxl_data", "sdxl_memory", "sdxl_speed"},
    "train_sdxl_lora": PARTS,
    "evaluate": PARTS | {"train_sdxl_lora"},
    "hpo_sweep": PARTS | {"train_sdxl_lora", "evaluate"},
}
BLOCKS = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.If, ast.For, ast.AsyncFor, ast.While),
    *(ast.With, ast.AsyncWith, ast.Try, ast.TryStar),
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

every_script = pytest.mark.parametrize("script", MAX_LINES)


def expect_none(faults):
    assert not faults, "\n" + "\n".join(map(str, faults))


def read(name):
    path = ROOT / name
    assert path.exists(), f"{name} is missing"
    return path.read_text()


# Sizes


def nesting(node, depth=0):
    """Longest chain of def, class, if, for, while, with, try; an elif is no deeper than its if."""

    def step(parent, child):
        is_elif = isinstance(parent, ast.If) and isinstance(child, ast.If) and child in parent.orelse
        return isinstance(child, BLOCKS) and not is_elif

    return max([depth] + [nesting(child, depth + step(node, child)) for child in ast.iter_child_nodes(node)])


def find_size_faults(source, max_lines):
    """Sentences about the lines of the file, its longest functions, their median and the nesting."""
    tree, faults = ast.parse(source), []
    lines = len(source.splitlines())
    if lines > max_lines:
        faults.append(f"{lines} lines, at most {max_lines}")
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    lengths = [node.end_lineno - node.lineno + 1 for node in functions]
    for node, length in zip(functions, lengths):
        if length > MAX_FUNCTION:
            faults.append(f"{node.name} has {length} lines, at most {MAX_FUNCTION}")
    median = statistics.median(lengths)
    if median > MAX_MEDIAN:
        faults.append(f"median of {median} lines, at most {MAX_MEDIAN}")
    if nesting(tree) > MAX_NESTING:
        faults.append(f"nesting of {nesting(tree)}, at most {MAX_NESTING}")
    return faults


@every_script
def test_scripts_and_functions_are_short_and_flat(script):
    expect_none(find_size_faults(read(script), MAX_LINES[script]))


def test_a_long_file_a_long_function_a_long_median_and_a_deep_one_are_seen():
    short = "def f():\n    pass\n"
    long = "def f():\n" + "    x\n" * 70
    hidden = "class A:\n    def f(self):\n" + "        x\n" * 71 + short * 2  # three functions of one name
    deep = "def f(x):\n" + "".join(f"{'    ' * depth}if x:\n" for depth in range(1, 6)) + "    " * 6 + "pass\n"
    medium = "def f():\n" + "    x\n" * 12
    assert find_size_faults(short, 2) == []
    assert find_size_faults(short, 1) == ["2 lines, at most 1"]
    assert find_size_faults(long + short * 2, 1000) == ["f has 71 lines, at most 70"]
    assert find_size_faults(hidden, 1000) == ["f has 72 lines, at most 70"]
    assert find_size_faults(deep, 1000) == ["nesting of 6, at most 5"]
    assert find_size_faults(medium, 1000) == ["median of 13 lines, at most 12"]
    elifs = "if x:\n    pass\n" + "elif x:\n    pass\n" * 9
    assert find_size_faults(short + elifs, 1000) == []


def find_long_files(lengths):
    return [f"{name}: {lines}" for name, lines in sorted(lengths.items()) if lines > MAX_TEST_FILE]


def test_test_files_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tests").glob("*.py")}
    assert "test_shape.py" in lengths
    expect_none(find_long_files(lengths))


def test_a_long_test_file_is_seen():
    assert find_long_files({"a.py": 600, "b.py": 601}) == ["b.py: 601"]


# Sections


def find_section_faults(source, titles=None):
    """Sentences about rules that are not 79 columns wide, numbers out of order and, if given, other titles."""
    lines, faults = source.splitlines(), []
    rules = [number for number, line in enumerate(lines, 1) if re.fullmatch("# ?-{5,}", line)]
    crooked = [number for number in rules if len(lines[number - 1]) != 79]
    if crooked:
        faults.append(f"rules that are not 79 columns wide in lines {crooked}")
    banners = re.findall(r"^# ?-{5,}\n# (\d+) (.+)\n# ?-{5,}$", source, flags=re.M)
    if len(rules) != 2 * len(banners):
        faults.append(f"{len(rules)} rules around {len(banners)} numbered titles")
    numbers = [int(number) for number, _ in banners]
    if not numbers or numbers != list(range(1, len(numbers) + 1)):
        faults.append(f"numbers {numbers}")
    found = [title.partition(":")[0] for _, title in banners]  # what follows a colon explains the title
    if titles and found != titles:
        faults.append(f"titles {found}, expected {titles}")
    return faults


@every_script
def test_sections_follow_each_other(script):
    titles = SECTIONS if script == "train_sdxl_lora.py" else None
    expect_none(find_section_faults(read(script), titles))


def test_a_missing_a_swapped_and_a_crooked_banner_are_seen():
    def banners(*titles, columns=79):
        rule = "# " + "-" * (columns - 2)
        return "".join(f"{rule}\n# {title}\n{rule}\n\nx = 1\n" for title in titles)

    assert find_section_faults(banners("1 Arguments: flags", "2 Main"), ["Arguments", "Main"]) == []
    assert find_section_faults(banners("1 Arguments", "2 Main"), ["Arguments", "Loss"])[0].startswith("titles")
    assert find_section_faults(banners("1 Arguments", "3 Main")) == ["numbers [1, 3]"]
    assert find_section_faults(banners("2 Main", "1 Arguments")) == ["numbers [2, 1]"]
    assert find_section_faults("x = 1\n") == ["numbers []"]
    crooked = banners("1 Arguments") + banners("2 Main", columns=80)
    assert find_section_faults(crooked) == ["rules that are not 79 columns wide in lines [6, 8]"]
    assert find_section_faults(banners("1 Arguments", "Main")) == ["4 rules around 1 numbered titles"]


# Order


def find_upward_calls(source):
    """(caller, called) of the functions and classes of the file that call what stands below them."""
    tree = ast.parse(source)
    kinds = (*FUNCTIONS, ast.ClassDef)
    order = {node.name: number for number, node in enumerate(tree.body) if isinstance(node, kinds)}
    return [
        (caller, call.func.id)
        for caller, number in order.items()
        for call in ast.walk(tree.body[number])
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and order.get(call.func.id, -1) > number
    ]


@every_script
def test_a_function_calls_only_what_stands_above_it(script):
    expect_none(find_upward_calls(read(script)))


def test_a_call_of_what_stands_below_is_seen():
    assert find_upward_calls("def f():\n    f()\ndef g():\n    f()\n") == []
    assert find_upward_calls("def f():\n    g()\ndef g():\n    pass\n") == [("f", "g")]
    assert find_upward_calls("class A:\n    def f(self):\n        return B()\nclass B:\n    pass\n") == [("A", "B")]


# Imports


def list_imports(source):
    """Top-level names of the modules that a file imports, also inside functions and by import_module("name")."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {word.value for word in node.args if isinstance(word, ast.Constant)}
    return {name.partition(".")[0] for name in names}


def find_forbidden_imports(sources):
    """(importer, imported) of the scripts {name: source} that MAY_IMPORT does not allow."""
    return [
        (importer, imported)
        for importer, source in sources.items()
        for imported in sorted(list_imports(source) & MAY_IMPORT.keys() - MAY_IMPORT[importer])
    ]


def test_scripts_import_each_other_in_one_direction():
    expect_none(find_forbidden_imports({name: read(f"{name}.py") for name in MAY_IMPORT}))


def test_a_circle_is_seen_also_inside_a_function():
    good = {"sdxl_data": "import torch", "hpo_sweep": "import evaluate\nfrom train_sdxl_lora import InputError"}
    assert find_forbidden_imports(good) == []
    for line in (
        "import evaluate",
        "from evaluate import main",
        "import importlib; importlib.import_module('evaluate')",
    ):
        bad = {"train_sdxl_lora": f"import sdxl_data\ndef f():\n    {line}\n"}
        assert find_forbidden_imports(bad) == [("train_sdxl_lora", "evaluate")]
    assert find_forbidden_imports({"sdxl_data": "import sdxl_data"}) == [("sdxl_data", "sdxl_data")]


# Seams

CORE = ("train_sdxl_lora.py", "sdxl_data.py")  # README's table is about these two


def list_seams(source):
    """[(comment, name of the function, class or constant below it)] of the `# Seam:` comments of a file."""
    seams, lines = [], source.splitlines()
    for first, line in enumerate(lines):
        if not line.startswith("# Seam:"):
            continue
        below = first
        while lines[below].startswith(("#", "@")):
            below += 1
        name = re.match(r"(?:def |async def |class )?(\w+)", lines[below])
        seams.append((" ".join(lines[first:below]), name[1] if name else None))
    return seams


def list_table(readme):
    """Names in backticks in README's table `| to change | edit | … |`; flags and files are not names."""
    rows = re.search(r"^\| *to change *\|.*\n\|[-:| ]+\n((?:\|.*\n)+)", readme, flags=re.M | re.I)
    return set(re.findall(r"`([A-Za-z_]\w*)(?:\(\))?`", rows[1])) if rows else set()


def find_seam_faults(sources, readme, at_least):
    """Sentences about the seams of {script: source}: no contract, too few, not in README's table, or only there."""
    seams = {script: list_seams(source) for script, source in sources.items()}
    every = [seam for script in sources for seam in seams[script]]
    core = [seam for script in CORE for seam in seams.get(script, [])]
    listed = list_table(readme)
    faults = [f"no contract: {comment}" for comment, _ in every if "Contract:" not in comment]
    faults += [f"nothing below: {comment}" for comment, name in every if name is None]
    if len(core) < at_least:
        faults.append(f"{len(core)} seams, at least {at_least}")
    faults += [f"{name} is not in README's table" for _, name in core if name and name not in listed]
    faults += [f"{name} has no seam" for name in sorted(listed - {name for _, name in every})]
    return faults


def test_every_seam_states_its_contract_and_readme_names_it():
    sources = {script: read(script) for script in MAX_LINES}
    expect_none(find_seam_faults(sources, read("README.md"), at_least=7))


def test_a_seam_without_contract_or_row_and_a_row_without_seam_are_seen():
    readme = (
        "| to change | edit |\n|---|---|\n| loss | `loss`, or `--flag` |\n| mix | `Mix` in `sdxl_data.py` |\n\n`x`\n"
    )
    data = "# Seam: mix. Contract:\n# two lines.\n@decorated\nclass Mix:\n    pass\n"
    good = {"train_sdxl_lora.py": "# Seam: loss. Contract: one.\ndef loss():\n    pass\n", "sdxl_data.py": data}
    assert find_seam_faults(good, readme, 2) == []
    assert find_seam_faults(good, readme, 3) == ["2 seams, at least 3"]
    assert find_seam_faults(good, readme.replace("`Mix`", "Mix"), 2) == ["Mix is not in README's table"]
    assert find_seam_faults(good, readme.replace("`Mix`", "`Mix`, `draw`"), 2) == ["draw has no seam"]
    assert find_seam_faults(good, "", 2) == ["loss is not in README's table", "Mix is not in README's table"]
    silent = good | {"evaluate.py": "# Seam: score.\ndef score():\n    pass\n"}
    assert find_seam_faults(silent, readme, 2) == ["no contract: # Seam: score."]
    lost = good | {"evaluate.py": "# Seam: score. Contract: one.\n\ndef score():\n    pass\n"}
    assert find_seam_faults(lost, readme, 2) == ["nothing below: # Seam: score. Contract: one."]


# Requirements


def normalize(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def find_unlisted_packages(sources, requirements, distributions):
    """Imported names of {file: source}, neither Python's own nor a file's, none of whose distributions is pinned."""
    pinned = {normalize(name) for name in re.findall(r"^([\w.-]+)(?:\[.*\])?==", requirements, flags=re.M)}
    own = {name.rpartition("/")[2].removesuffix(".py") for name in sources}
    missing = set()
    for name, source in sources.items():
        for module in list_imports(source) - own - sys.stdlib_module_names:
            if not pinned & {normalize(distribution) for distribution in distributions.get(module, [module])}:
                missing.add(f"{module} ({name})")
    return sorted(missing)


def test_requirements_list_every_package_that_is_imported():
    paths = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    made = ("demo/output/", "demo/data/")
    kept = [str(path) for path in paths if not any(part.startswith(".") for part in path.parts)]
    sources = {name: read(name) for name in kept if not name.startswith(made)}
    assert "tests/test_shape.py" in sources and "sagemaker/submit.py" in sources
    requirements = read("requirements.txt") + read("sagemaker/requirements.txt")
    expect_none(find_unlisted_packages(sources, requirements, importlib.metadata.packages_distributions()))


def test_a_package_that_is_not_listed_or_not_pinned_is_seen():
    sources = {"a.py": "import os\nimport b\ndef f():\n    from PIL import Image\n", "x/b.py": "import yaml.nodes\n"}
    installed = {"PIL": ["pillow"], "yaml": ["PyYAML"]}
    assert find_unlisted_packages(sources, "pillow==1.0\npyyaml[all]==2.0\n", installed) == []
    assert find_unlisted_packages(sources, "pillow==1.0\n# PyYAML==2.0\n", installed) == ["yaml (x/b.py)"]
    assert find_unlisted_packages(sources, "pillow\nPyYAML==2.0\n", installed) == ["PIL (a.py)"]
    assert find_unlisted_packages({"a.py": "import sdk.train"}, "sdk==1.0\n", {}) == []
    assert find_unlisted_packages({"a.py": "import sdk.train"}, "", {}) == ["sdk (a.py)"]
