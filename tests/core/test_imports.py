import ast
import sys

import pytest

import xglm_core
from tests.helpers.commands import ROOT, run
from tests.helpers.frameworks import needs
from xglm_core.backends import BACKENDS, load_backend, require_frameworks
from xglm_core.errors import BackendError

FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "jaxlib", "flax"}
OURS = {"xglm_core", *(backend.package for backend in BACKENDS.values())}


def sources(package):
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths, f"{package} has no modules"
    return paths


def is_for_type_checkers(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported(path, package, *, everywhere):
    """Top-level packages that a file imports: all of them, or only those that importing the file imports."""
    names, nodes = set(), list(ast.parse(path.read_text(encoding="utf-8")).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package if node.level else node.module.partition(".")[0])
        elif everywhere or not (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_type_checkers(node)):
            nodes += ast.iter_child_nodes(node)
    return names - sys.stdlib_module_names


class TestCore:
    def test_import_loads_nothing_heavy(self):
        loaded = run("import json, xglm_core; print(json.dumps(sorted(sys.modules)))")
        heavy = FRAMEWORKS | {"numpy", "sentencepiece", "tokenizers", "huggingface_hub", "matplotlib", "transformers"}
        assert "xglm_core" in loaded
        assert heavy.isdisjoint(loaded)

    def test_config_needs_no_numpy(self):
        assert "numpy" not in run("import json, xglm_core.config; print(json.dumps(sorted(sys.modules)))")

    def test_import_is_fast(self):
        """Within 0.15 s; measured inside the interpreter, without its start, and at a quiet moment of the machine."""
        code = "import json, time; t = time.perf_counter(); import xglm_core; print(time.perf_counter() - t)"
        assert min(run(code) for _ in range(5)) < 0.15

    def test_every_module_works_without_frameworks(self):
        hidden = FRAMEWORKS | {
            "tokenizers",
            "huggingface_hub",
            "matplotlib",
            "transformers",
            "safetensors",
            "h5py",
            "msgpack",
            "lm_eval",
            "tqdm",
        }
        modules = [
            ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for path in sources("xglm_core")
            if path.name != "__main__.py"
        ]
        code = f"""
hide(*{sorted(hidden)})
import importlib, json
for name in {modules}:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""
        loaded = run(code)
        assert set(modules) <= set(loaded)
        assert hidden.isdisjoint(loaded)

    @pytest.mark.parametrize("path", sources("xglm_core"), ids=lambda path: str(path.relative_to(ROOT)))
    def test_imports(self, path):
        at_import = imported(path, "xglm_core", everywhere=False)
        assert at_import <= {"xglm_core", "numpy", "sentencepiece"}
        # The command line and the comparison load backends by name, through `load_backend`.
        assert imported(path, "xglm_core", everywhere=True).isdisjoint(OURS - {"xglm_core"})

    def test_public_names(self):
        for name in xglm_core.__all__:
            assert getattr(xglm_core, name).__name__ == name
            assert name in dir(xglm_core)
        assert sorted(xglm_core.__all__) == sorted(xglm_core._HOMES)
        with pytest.raises(AttributeError, match="module 'xglm_core' has no attribute 'XGLMConfigs'"):
            _ = xglm_core.XGLMConfigs


# Whatever a process shares, for each backend: (modules needed, expression to be equal before and after our import).
SHARED_STATE = {
    "torch": (
        "torch",
        "[torch.get_default_dtype(), torch.initial_seed(), torch.get_num_threads(), torch.is_grad_enabled(),"
        " torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),"
        " torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_rng_state().tolist()]",
    ),
    "tf": (
        "tensorflow, keras",
        "[keras.config.floatx(), keras.config.dtype_policy().name, keras.config.image_data_format(),"
        " keras.config.backend(), tensorflow.config.functions_run_eagerly(), tensorflow.config.optimizer.get_jit(),"
        " tensorflow.config.experimental.tensor_float_32_execution_enabled(),"
        " tensorflow.random.get_global_generator().state.numpy().tolist()]",
    ),
    "flax": ("jax, flax", "[sorted(jax.config.values.items(), key=str), sorted(vars(flax.config)['_values'].items())]"),
}


@pytest.mark.parametrize("name", BACKENDS)
class TestBackends:
    def test_imports(self, name):
        backend = BACKENDS[name]
        allowed = {"xglm_core", "numpy", backend.package, *backend.frameworks}
        if name == "tf":
            allowed.add("optree")  # Keras' own, by which it takes containers apart.
        elif name == "flax":
            allowed.add("optax")  # Flax's own, of which its state of training is made.
        for path in sources(backend.package):
            assert imported(path, backend.package, everywhere=True) <= allowed, path

    def test_missing_framework(self, name):
        backend = BACKENDS[name]
        for missing in ([framework] for framework in backend.frameworks):
            code = f"""
hide(*{missing})
import json
try:
    import {backend.package}
except ImportError as error:
    print(json.dumps([str(error), sorted(sys.modules)]))
"""
            message, loaded = run(code)
            # The other framework of the backend may be missing here as well.
            assert message.startswith(f"the {name} backend needs ")
            assert missing[0] in message.partition(",")[0]
            assert message.endswith(f"not installed here; run: pip install 'xglm[{name}]'")
            assert FRAMEWORKS.isdisjoint(loaded)

    def test_alone(self, name):
        """It loads where no other framework and no other backend is installed, and changes nothing that is shared."""
        needs(name)
        backend = BACKENDS[name]
        others = {framework for other in BACKENDS.values() for framework in other.frameworks} - {*backend.frameworks}
        hidden = others | OURS - {"xglm_core", backend.package} | {"sentencepiece", "safetensors", "transformers"}
        frameworks, state = SHARED_STATE[name]
        code = f"""
hide(*{sorted(hidden)})
import json, os, random, warnings
import numpy
import {frameworks}

def state():
    shared = [dict(os.environ), list(warnings.filters), random.getstate(), numpy.random.get_state(), numpy.geterr()]
    return str(shared + {state})

before = state()
from xglm_core.backends import load_backend
package = load_backend("{name}")
public = {{name: getattr(package, name).__name__ for name in package.__all__}}
print(json.dumps([before == state(), sorted(sys.modules), package.__name__, public]))
"""
        unchanged, loaded, package, public = run(code)
        assert unchanged
        assert hidden.isdisjoint(loaded)
        assert package == backend.package
        assert public == dict(zip(public, public, strict=True))
        assert backend.causal_lm in public


def test_keras_on_another_framework():
    needs("tf")
    code = """
import json
try:
    import xglm_tf
except ImportError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
    kind, message = run(code, KERAS_BACKEND="numpy")
    assert kind == "BackendError"
    assert "Keras runs on numpy; set the environment variable KERAS_BACKEND=tensorflow" in message


def test_unknown_backend():
    for function in (require_frameworks, load_backend):
        with pytest.raises(BackendError, match="no backend 'keras'; expected one of torch, tf, flax"):
            function("keras")


def test_loading_in_pytorch_leaves_its_compiler_alone():
    """Its import takes as long as that of PyTorch itself; a draw on the meta device would have it imported."""
    needs("torch")
    code = """
import json, sys
from xglm_torch import XGLMForCausalLM
XGLMForCausalLM.from_pretrained("examples/tiny_model/checkpoint")
print(json.dumps("torch._dynamo" in sys.modules))
"""
    assert run(code) is False
