"""What an editor knows of the public road: the real types of what the model's methods return."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import av_lens

LINES = {
    'avl.load("av-tiny")': "HookedAVLLM",
    'model.encode(None, "What?")': "AVInputs",
    'model.encode(None, "What?").spans.audio': "Span",
    "model.to('cpu')": "HookedAVLLM",
    "model.eval()": "HookedAVLLM",
    "model.compatible()": "HookedAVLLM",
    "model.trace(x)": "Trace",
    "model(x)": "Tensor",
    'model(x, return_type="both")': "tuple[Tensor, Tensor]",
    "model(x, return_type=None)": "None",
    "model.generate(x)": "Tensor",
    'model.generate(x, return_type="text")': "str | list[str]",
    'model.generate(x, return_type="result")': "Generated",
    "model.run_with_cache(x)": "tuple[Tensor, ActivationCache]",
    "model.run_with_cache(x, return_cache_object=False)": "tuple[Tensor, dict[str, Tensor]]",
    "model.run_with_hooks(x)": "Tensor",
    "model.hooks()": "_GeneratorContextManager[HookedAVLLM, None, None]",
    "model.bound(x)": "TransformerBridge",
    "model.spec": "ModelSpec",
    "model.device": "device",
    "model.encoder": "Encoder",
    "x[0]": "AVInputs",
    "avl.Pair(clean=x, corrupt=x)[0]": "Pair",
    "check_model(model)": "CheckReport",
}


@pytest.mark.slow
def test_what_the_models_methods_return_is_known_before_it_runs(tmp_path: Path):
    lines = [
        "import av_lens as avl; from av_lens.model import check_model",
        'model = avl.load("av-tiny")',
        'x = model.encode(None, "What?")',
    ]
    lines += [f"reveal_type({expression})" for expression in LINES]
    lines += ['model.encode(None, "What?", sonud="separate")']
    asked = tmp_path / "asked.py"
    asked.write_text("\n".join(lines) + "\n")
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(Path(av_lens.__file__).parents[1])]}))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "-p", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    told = json.loads(done.stdout)["generalDiagnostics"]
    wrong = [one for one in told if one["severity"] != "information"]
    assert [one["message"] for one in wrong] == ['No parameter named "sonud"']
    found = {one["range"]["start"]["line"]: one["message"].rpartition(" is ")[2].strip('"') for one in told}
    assert {line: found.get(number) for number, line in enumerate(LINES, start=3)} == LINES
