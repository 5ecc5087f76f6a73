"""The layers of the house: imports point down, and what must start without torch does."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.imports import Source

ROOT = Path(__file__).parents[1]
# From the lowest up: a layer may import itself and those that stand before it. `llama` alone is the facade,
# the names that users import; nothing inside the house does.
LAYERS = {
    "config": ["llama.config", "llama.strict_json"],
    "machine": ["llama.machine", "llama.demo", "llama.progress"],
    "text": ["llama.text"],
    "model": ["llama.model"],
    "checkpoint": ["llama.checkpoint"],
    "engine": ["llama.engine"],
    "internals": ["llama.internals"],
    "runtime": ["llama.runtime", "llama.driver", "llama.completion", "llama.toolbox",
                "llama.generation_config", "llama.flags"],
    "evaluation": ["llama.evaluation"],
    "facade": ["llama"],
    "server": ["server"],
    "cli": ["llama.cli", "llama.commands", "llama.terminal", "llama.__main__"],
}
STRANGERS = {("model", "text"), ("engine", "text")}  # lower, and yet not to be imported by the first
WITHOUT_TORCH = ["llama.config", "llama.strict_json", "llama.machine", "llama.text", "llama.engine.request",
                 "llama.engine.runs", "llama.engine.blocks", "llama.engine.scheduler", "llama.engine.step",
                 "llama.engine.constraint"]
STARTS_WITHOUT_TORCH = ["llama", "server"]
BRING_TORCH = {"torch", "triton", "transformers", "safetensors.torch"}
DEPENDENCIES = {"torch", "triton", "safetensors", "tokenizers", "jinja2", "numpy", "huggingface_hub",
                "llguidance"}


def layer_of(module: str) -> str | None:
    """The layer with the longest matching name; None for a module of `llama` that has no place yet."""
    for layer, names in LAYERS.items():
        if any(module == name or module.startswith(f"{name}.") for name in names if name != "llama"):
            return layer
    return "facade" if module == "llama" else None


def violations(root: Path) -> list[str]:
    """Everything in the tree under `root` that goes against the layers, a sentence each."""
    source, found = Source.under(root, "llama", "server"), []
    for module in source.files:
        layer = layer_of(module)
        if layer is None:
            found.append(f"{module} is in no layer; give it one in tests/test_layers.py")
            continue
        for each in source.imports(module):
            top, where = each.target.split(".")[0], f"{module}, line {each.line}"
            if top in ("llama", "server"):
                if not may_import(layer, layer_of(each.target)):
                    found.append(f"{where}: {layer} imports {each.target}")
            elif top not in sys.stdlib_module_names | DEPENDENCIES:
                found.append(f"{where}: {top} is no dependency")
        found += torch_in(source, module)
    return found


def may_import(layer: str, target: str | None) -> bool:
    """Whether the one layer may import the other."""
    if target is None or (layer, target) in STRANGERS:
        return False
    return list(LAYERS).index(target) <= list(LAYERS).index(layer)


def torch_in(source: Source, module: str) -> list[str]:
    """How torch comes into a module that must do without it, or must start without it."""
    def is_among(names: list[str]) -> bool:
        return any(module == name or name != "llama" and module.startswith(f"{name}.") for name in names)

    if not is_among(WITHOUT_TORCH + STARTS_WITHOUT_TORCH):
        return []
    reached = source.reached(module, lazily=is_among(WITHOUT_TORCH))
    return [f"{module} brings in torch: {' -> '.join(chain)}" for target, chain in reached.items()
            if any(target == name or target.startswith(f"{name}.") for name in BRING_TORCH)]


def test_imports_point_down():
    assert violations(ROOT) == []


# A small house that keeps the rules, in every form of import.
CLEAN = {
    "llama/__init__.py": "import importlib\n_HOMES = {'Llama': 'llama.runtime'}\n"
                         "def __getattr__(name): return importlib.import_module(_HOMES[name])\n",
    "llama/config.py": "import json\n",
    "llama/text/__init__.py": "",
    "llama/text/chat.py": "import jinja2\nfrom llama.config import A\nfrom . import stream\n",
    "llama/text/stream.py": "from .. import config\n",
    "llama/model/__init__.py": "import torch\n",
    "llama/model/rope.py": "from llama.config import A\n",
    "llama/checkpoint/__init__.py": "import safetensors.torch\nfrom llama.model.rope import A\n",
    "llama/engine/__init__.py": "",
    "llama/engine/request.py": "from llama.config import A\n",
    "llama/engine/blocks.py": "",
    "llama/engine/scheduler.py": "from llama.engine import blocks\nfrom .request import A\n",
    "llama/engine/engine.py": "import torch\nfrom llama.model import rope\n",
    "llama/internals/__init__.py": "import llama.engine.engine\n",
    "llama/runtime.py": "from llama.engine.engine import A\nfrom llama.text.chat import A\n",
    "llama/cli.py": "def f(name):\n    import llama.runtime, server.http\n"
                    "    __import__(f'llama.commands.{name}')\n",
    "llama/commands/__init__.py": "from llama import Llama\n",
    "llama/commands/chat.py": "",
    "server/__init__.py": "import typing\nif typing.TYPE_CHECKING:\n    from llama.runtime import Llama\n",
    "server/http.py": "from llama.engine.request import A\nfrom server.supervisor import start\n",
    "server/supervisor.py": "def start():\n    from llama.runtime import Llama\n",
}
# What is added to which module, and what is said of it.
PLANTED = [
    ("llama/config.py", "import llama.text", "llama.config, line 2: config imports llama.text"),
    ("llama/config.py", "import torch", "llama.config brings in torch: llama.config -> torch"),
    ("llama/text/chat.py", "from llama.model import rope", "text imports llama.model.rope"),
    ("llama/text/chat.py", "from ..model.rope import A", "text imports llama.model.rope"),
    ("llama/text/stream.py", "def f():\n    import torch", "llama.text.stream -> torch"),
    ("llama/text/stream.py", "import torch.nn as x", "llama.text.chat brings in torch: llama.text.chat -> "),
    ("llama/text/chat.py", "from transformers import A", "in torch: llama.text.chat -> transformers"),
    ("llama/text/chat.py", "from transformers import A", "line 4: transformers is no dependency"),
    ("llama/text/__init__.py", "import safetensors.torch", "llama.text.stream brings in torch"),
    ("llama/text/chat.py", "from llama import Llama", "text imports llama"),
    ("llama/text/chat.py", "import typing\nif typing.TYPE_CHECKING:\n    import llama.engine.request",
     "line 6: text imports llama.engine.request"),
    ("llama/model/rope.py", "from llama.text.chat import A", "model imports llama.text.chat"),
    ("llama/model/rope.py", "class A:\n    def f(self):\n        from llama import checkpoint",
     "line 4: model imports llama.checkpoint"),
    ("llama/checkpoint/__init__.py", "from llama.engine import request",
     "checkpoint imports llama.engine.request"),
    ("llama/engine/engine.py", "from llama.text import stream", "engine imports llama.text.stream"),
    ("llama/engine/engine.py", "f = lambda: __import__('llama.text')", "engine imports llama.text"),
    ("llama/engine/engine.py", "import importlib as i\ni.import_module('..text.chat')",
     "engine imports llama.text.chat"),
    ("llama/engine/engine.py", "HOMES = {'a': ['llama.runtime']}", "line 3: engine imports llama.runtime"),
    ("llama/engine/blocks.py", "import torch", "llama.engine.scheduler -> llama.engine.blocks -> torch"),
    ("llama/engine/blocks.py", "from llama.model.rope import A", "llama.model -> torch"),
    ("llama/engine/request.py", "def f():\n    from . import engine",
     "llama.engine.request -> llama.engine.engine -> torch"),
    ("llama/engine/__init__.py", "from .engine import A",
     "llama.engine.request -> llama.engine -> llama.engine.engine -> torch"),
    ("llama/internals/__init__.py", "import llama.runtime", "internals imports llama.runtime"),
    ("llama/runtime.py", "def f():\n    from llama.cli import main", "runtime imports llama.cli"),
    ("llama/runtime.py", "import server", "runtime imports server"),
    ("llama/runtime.py", "__import__(f'llama.commands.{1}')", "runtime imports llama.commands.chat"),
    ("llama/__init__.py", "from llama.runtime import Llama", "llama brings in torch: llama -> llama.runtime"),
    ("server/http.py", "import llama.runtime", "server.http brings in torch: server.http -> llama.runtime"),
    ("server/supervisor.py", "import numpy, torch", "server.http -> server.supervisor -> torch"),
    ("server/http.py", "import llama.commands", "server imports llama.commands"),
    ("server/http.py", "import fastapi", "server.http, line 3: fastapi is no dependency"),
    ("llama/helpers.py", "", "llama.helpers is in no layer; give it one"),
]


def plant(root: Path, files: dict[str, str]) -> None:
    """Write a tree of source files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_a_tree_that_keeps_the_layers_is_clean(tmp_path):
    plant(tmp_path, CLEAN)
    assert violations(tmp_path) == []


@pytest.mark.parametrize("name, line, sentence", PLANTED)
def test_a_planted_violation_is_found(tmp_path, name, line, sentence):
    plant(tmp_path, CLEAN | {name: f"{CLEAN.get(name, '')}{line}\n"})
    assert any(sentence in each for each in violations(tmp_path)), violations(tmp_path)


def test_an_import_whose_name_is_computed_is_refused(tmp_path):
    plant(tmp_path, CLEAN | {"llama/runtime.py": "__import__('llama' + '.cli')\n"})
    with pytest.raises(ValueError, match="llama.runtime, line 1: write the imported module's name as a string"):
        violations(tmp_path)


def test_importing_llama_and_its_text_loads_neither_torch_nor_transformers():
    whole = WITHOUT_TORCH + STARTS_WITHOUT_TORCH
    modules = [module for module in Source.under(ROOT, "llama", "server").files
               if module in whole or module.startswith(("llama.text.", "server."))]
    assert {"llama", "llama.text.tokenizer", "llama.engine.scheduler"} <= set(modules)
    script = f"import sys, {', '.join(modules)}\nprint([*{{'torch', 'transformers'}} & sys.modules.keys()])"
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_every_package_is_installed():
    files = Source.under(ROOT, "llama", "server").files
    packages = {module for module, path in files.items() if path.name == "__init__.py"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert packages <= set(project["tool"]["setuptools"]["packages"])
