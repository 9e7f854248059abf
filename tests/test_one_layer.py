"""A decoder layer is written once, and so is the loop over layers: the package's own text is searched for second ones.

Looked for, function by function, in every file of the package: a rotary application (a half negated and put before the
other, or subtracted in place), an attention product (queries times transposed keys, or a softmax in float32), a gated
MLP (a non-linearity's result times something), and a loop that runs layers. Exempt by name: the encoders, the training
engine of the organisms and of the planted models, and the benchmark's peers and roofline.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import av_lens

ROOT = Path(av_lens.__file__).parent
DECODER, LOOP, KERNELS = "families/decoder.py", "replay/rerun.py", "families/kernels.py"
EXEMPT = ("organism/language.py", "organism/language.py", "lab/planting/", "lab/training/", "lab/replay_benchmark/")
NON_LINEAR = {"act", "act_fn", "silu", "gelu"}
OF_A_LAYER = {"run_layer", "heads", "turned", "write", "mlp", "attn", "self_attn", "attended"}


def name_of(node: ast.AST) -> str:
    """What a call or attribute is called: the last word of it."""
    if isinstance(node, ast.Call):
        return name_of(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def calls(node: ast.AST) -> list[ast.Call]:
    return [one for one in ast.walk(node) if isinstance(one, ast.Call)]


def negative(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)


def transposed(node: ast.AST) -> bool:
    return name_of(node) in ("transpose", "mT") and not isinstance(node, ast.Name)


def rotates(function: ast.AST) -> bool:
    """`cat((-second, first))`, an in-place product with a minus sign, or a library's function."""
    for call in calls(function):
        first = call.args[0] if call.args else None
        if name_of(call) == "cat" and isinstance(first, ast.Tuple | ast.List) and any(map(negative, first.elts)):
            return True
        subtracts = any(word.arg == "value" and negative(word.value) for word in call.keywords)
        if name_of(call).startswith("apply_rotary") or (name_of(call) in ("addcmul", "addcmul_") and subtracts):
            return True
    return False


def attends(function: ast.AST) -> bool:
    """`q @ k.transpose(..)` in any spelling, a softmax in float32, or a kernel for attention."""
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) and transposed(node.right):
            return True
        if isinstance(node, ast.Call):
            name, dtype = name_of(node), [ast.unparse(word.value) for word in node.keywords if word.arg == "dtype"]
            product = name in ("matmul", "bmm", "baddbmm", "times") and any(map(transposed, node.args))
            softmax = name == "softmax" and any(one.endswith("float32") for one in dtype)
            if product or softmax or "scaled_dot_product" in name:
                return True
    return False


def gates(function: ast.AST) -> bool:
    """`act(gate) * up`."""
    products = (one for one in ast.walk(function) if isinstance(one, ast.BinOp) and isinstance(one.op, ast.Mult))
    return any(
        isinstance(side, ast.Call) and name_of(side) in NON_LINEAR for one in products for side in (one.left, one.right)
    )


def runs_layers(function: ast.AST) -> bool:
    """A loop that finds blocks or runs a layer, unless it goes round `layers`."""
    for loop in ast.walk(function):
        if isinstance(loop, ast.For | ast.While):
            over, body = (loop.iter if isinstance(loop, ast.For) else loop.test), loop.body
        elif isinstance(loop, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            over, body = loop.generators[0].iter, [loop]
        else:
            continue
        inside = [call for part in body for call in calls(part)]
        finds = any(ast.unparse(call.func) == "Layer.of" or name_of(call) == "run_layer" for call in inside)
        over_layers = any(word in ast.unparse(over) for word in ("n_layers", "blocks", ".layers"))
        computes = any(name_of(call) in OF_A_LAYER and isinstance(call.func, ast.Attribute) for call in inside)
        if finds or (over_layers and computes and name_of(over) != "layers"):
            return True
    return False


def functions(text: str) -> list[ast.AST]:
    """Every outermost function or method, with all that is inside it."""
    tree = ast.parse(text)
    inside = [node for part in tree.body for node in (part.body if isinstance(part, ast.ClassDef) else [part])]
    return [node for node in inside if isinstance(node, ast.FunctionDef)]


def found(signature) -> set[str]:
    hits = set()
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        if not file.startswith(EXEMPT):
            hits |= {f"{file}: {one.name}" for one in functions(path.read_text()) if signature(one)}
    return hits


def test_rotary_position_is_applied_in_one_place():
    assert found(rotates) == {f"{DECODER}: rotated"}


def test_queries_meet_keys_in_one_place_written_out_and_by_a_kernel():
    written = {f"{DECODER}: {name}" for name in ("_softmax", "attended", "flash", "on_cpu")}
    assert found(attends) == written | {f"{KERNELS}: {name}" for name in ("_by_flash_attention", "_memory_efficiently")}


def test_an_mlp_is_gated_in_one_place():
    third_write = "families/gemma4_blocks.py: _leaving"  # of a family's own, gated by an embedding and not by an MLP
    assert found(gates) == {f"{DECODER}: mlp", third_write}


def test_one_loop_runs_the_layers():
    assert found(runs_layers) == {f"{LOOP}: layers", f"{LOOP}: run_layers"}


def test_what_is_exempt_is_there_and_would_be_found():
    for signature in (rotates, attends):
        files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).as_posix().startswith(EXEMPT)]
        assert any(signature(one) for path in files for one in functions(path.read_text())), signature.__name__


@pytest.mark.parametrize(
    ("signature", "text"),
    [
        (rotates, "x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin"),
        (rotates, "turned[..., :half].addcmul_(x[..., half:], sin, value=-1)"),
        (rotates, "q, k = apply_rotary_pos_emb(q, k, cos, sin)"),
        (attends, "scores = (q @ k.transpose(-1, -2)).float() * scaling"),
        (attends, "scores = torch.matmul(q, k.transpose(2, 3)) * scaling"),
        (attends, "pattern = scores.softmax(-1, dtype=torch.float32)"),
        (attends, "z = functional.scaled_dot_product_attention(q, k, v)"),
        (gates, "return layer.down(layer.act(layer.gate(n)) * layer.up(n))"),
        (gates, "return down(up(n) * functional.silu(gate(n)))"),
        (runs_layers, "for number in range(first, record.n_layers): made = run_layer(Layer.of(blocks[number]))"),
        (runs_layers, "for block in model.bridge.blocks: stream = stream + block.mlp(stream)"),
        (runs_layers, "all = [Layer.of(block) for block in model.bridge.blocks]"),
    ],
)
def test_a_second_one_would_be_found(signature, text):
    assert signature(ast.parse(f"def again(x):\n    {text}"))


def test_what_only_looks_alike_is_let_pass():
    for text in (
        "weight = logits.masked_fill(ids < 0, -inf).softmax(-1)",
        "hooks = [(hook_name('z', layer), keep(layer)) for layer in range(spec.n_layers)]",
        "for number, layer in layers(model): x = x + layer.mlp(x)",
        "moved = change.flatten(-2) @ weight",
    ):
        tree = ast.parse(f"def other(x):\n    {text}")
        assert not any(signature(tree) for signature in (rotates, attends, gates, runs_layers)), text
