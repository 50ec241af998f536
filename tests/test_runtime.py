"""Finding and checking the runtime, the native functions, products through ggml, and the doctor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spikequant_gguf import doctor as doctor_module
from spikequant_gguf import runtime
from spikequant_gguf.doctor import doctor
from spikequant_gguf.errors import FormatError, InputError, RuntimeMissingError, UnsupportedError
from spikequant_gguf.format import BLOCK_SPK4, BLOCK_SPKA, TYPE_SPK4, TYPE_SPKA, blocks_from_bytes
from spikequant_gguf.ggml_api import MatMul, buffer_types, mul_mat, mul_mat_id
from spikequant_gguf.ggml_patch.build import find_unpatched
from spikequant_gguf.ggml_patch.package import RUNTIME_MANIFEST, library_file
from spikequant_gguf.ggml_patch.toolchain import find_compiler
from spikequant_gguf.ggml_patch.upstream import load_releases, load_upstream, patch_id
from spikequant_gguf.native import NativeLibrary
from spikequant_gguf.runtime import find_runtime, native, require_runtime

F32, F16, Q4_0, Q8_0, Q8_1, Q6_K, IQ2_XXS = 0, 1, 2, 8, 9, 14, 16
VERSION = load_upstream().version

# ---- what can be wrong with an installation


class FakeRuntime:
    """An importable llama_cpp whose libraries only say what they are."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.package = root / "llama_cpp"
        self.library_dir = self.package / "lib"
        self.library_dir.mkdir(parents=True)
        self.python(VERSION)
        monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
        monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
        monkeypatch.syspath_prepend(str(root))

    def python(self, version: str) -> None:
        text = f'raise RuntimeError("imported before it was checked")\n__version__ = "{version}"\n'
        (self.package / "__init__.py").write_text(text)

    def libraries(self, folder: Path | None = None, **answers: object) -> None:
        """Compile both libraries; an answer of None leaves its function out."""
        facts = {"abi": runtime.ABI, "patch_id": patch_id(), "pin": VERSION} | answers
        base = "".join(
            f"int spikequant_{name}(void) {{ return {answer}; }}\n"
            if isinstance(answer, int)
            else f'const char * spikequant_{name}(void) {{ return "{answer}"; }}\n'
            for name, answer in facts.items()
            if answer is not None
        )
        folder = folder or self.library_dir
        self.compile(folder / library_file("ggml-base"), base + "int some_stock_function;\n")
        self.compile(
            folder / library_file("ggml-cpu"), 'const char * spikequant_kernel(void) { return "test"; }\n'
        )

    @staticmethod
    def compile(target: Path, text: str) -> None:
        command = [find_compiler()[0], "-shared", "-fPIC", "-x", "c", "-", "-o", target]
        subprocess.run(command, input=text, text=True, check=True, capture_output=True)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    return FakeRuntime(tmp_path / "site", monkeypatch)


def test_a_fitting_runtime_is_described(fake: FakeRuntime) -> None:
    fake.libraries()
    info = require_runtime()
    assert (info.abi, info.patch_id, info.pin, info.kernel) == (runtime.ABI, patch_id(), VERSION, "test")
    assert info.patched and info.library_dir == fake.library_dir and info.llama_cpp_version == VERSION
    assert json.loads(json.dumps(info.to_json()))["library_dir"] == str(fake.library_dir)


def problem() -> str:
    """What require_runtime complains about; every complaint says how to mend it."""
    with pytest.raises(RuntimeMissingError) as caught:
        require_runtime()
    assert "spikequant build" in str(caught.value.remedy)
    assert caught.value.message == find_runtime().problem
    return caught.value.message


def test_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    assert problem() == "llama-cpp-python is not installed"


def test_unpatched(fake: FakeRuntime) -> None:
    fake.libraries(abi=None, patch_id=None, pin=None)
    assert problem() == f"llama-cpp-python {VERSION} is installed without the SpikeQuant patch {patch_id()}"
    assert not find_runtime().patched


def test_another_version(fake: FakeRuntime) -> None:
    fake.python("0.3.99")
    fake.libraries()
    known = " or ".join(upstream.version for upstream in load_releases())
    assert problem() == f"llama-cpp-python 0.3.99 is installed, but this package is made for {known}"


def test_a_neighbour_of_the_pin_fits_with_libraries_of_its_own(fake: FakeRuntime) -> None:
    neighbour = load_releases()[1]
    fake.python(neighbour.version)
    fake.libraries(patch_id=patch_id(neighbour), pin=neighbour.version)
    info = require_runtime()
    assert (info.llama_cpp_version, info.pin) == (neighbour.version, neighbour.version)
    assert patch_id(neighbour) != patch_id()


@pytest.mark.parametrize("pin", [False, True])
def test_a_neighbour_with_libraries_of_the_pin_does_not_fit(fake: FakeRuntime, pin: bool) -> None:
    neighbour = load_releases()[1].version
    fake.python(neighbour)
    fake.libraries(pin=neighbour if pin else VERSION)
    expected = f"patch {patch_id()}, but" if pin else f"from llama-cpp-python {VERSION}, but its Python files"
    assert expected in problem()


def test_another_abi(fake: FakeRuntime) -> None:
    fake.libraries(abi=runtime.ABI + 1)
    assert f"ABI {runtime.ABI + 1}, but this package needs ABI {runtime.ABI}" in problem()


def test_another_patch(fake: FakeRuntime) -> None:
    fake.libraries(patch_id="0123456789ab")
    assert problem().endswith(f"patch 0123456789ab, but this package carries patch {patch_id()}")


def test_libraries_of_another_version(fake: FakeRuntime) -> None:
    fake.libraries(pin="0.3.35")
    assert (
        problem()
        == f"the libraries are built from llama-cpp-python 0.3.35, but its Python files are {VERSION}"
    )


def test_no_libraries(fake: FakeRuntime) -> None:
    assert f"has no {library_file('ggml-base')} in {fake.library_dir}" in problem()


def test_libraries_that_do_not_load(fake: FakeRuntime) -> None:
    (fake.library_dir / library_file("ggml-base")).write_bytes(b"not a library")
    assert "cannot be loaded" in problem()


def test_libraries_elsewhere_are_the_ones_that_count(
    fake: FakeRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.libraries()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    fake.libraries(elsewhere, patch_id="0123456789ab")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(elsewhere))
    assert "0123456789ab" in problem()
    assert "unset LLAMA_CPP_LIB_PATH" in str(find_runtime().remedy)


def test_tools_of_a_build_that_is_gone(
    fake: FakeRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.libraries()
    monkeypatch.setenv("SPIKEQUANT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RuntimeMissingError, match="llama-quantize is missing in the build cache"):
        runtime.tool("llama-quantize")
    manifest = {"key": "some-key", "build": str(tmp_path / "gone")}
    (fake.library_dir / RUNTIME_MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RuntimeMissingError, match="converter is missing in the build cache"):
        runtime.converter_script()
    moved = tmp_path / "cache/builds/some-key/bin/llama-quantize"
    moved.parent.mkdir(parents=True)
    moved.touch()
    assert runtime.tool("llama-quantize") == moved, "a cache that has moved is found by the key"


# ---- the real runtime


@pytest.fixture(scope="module")
def library() -> NativeLibrary:
    return native()


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((200, 576), np.float32)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(4).standard_normal((9, 576), np.float32)


def test_the_installed_runtime_is_this_package_s(library: NativeLibrary) -> None:
    info = require_runtime()
    assert (library.patch_id, library.pin, library.abi) == (patch_id(), VERSION, runtime.ABI)
    assert library.kernel == info.kernel and library.patched
    assert runtime.import_llama_cpp().__version__ == VERSION


LOADED_LIBRARIES = """
from pathlib import Path
from spikequant_gguf.runtime import import_llama_cpp, native
native()
import_llama_cpp()
paths = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
print(*sorted(path for path in paths if Path(path).name.startswith(("libggml", "libllama"))), sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_llama_cpp_uses_the_libraries_that_native_uses(library: NativeLibrary) -> None:
    """Two copies of libggml-base in a process would mean two backend registries."""
    command = [sys.executable, "-c", LOADED_LIBRARIES]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    names = ("ggml", "ggml-base", "ggml-cpu", "ggml-rpc", "llama")
    assert loaded == sorted(str((library.library_dir / library_file(name)).resolve()) for name in names)


@pytest.mark.parametrize("tool", ["llama-quantize", "llama-perplexity", "llama-bench", "llama-imatrix"])
def test_tools_start(tool: str) -> None:
    result = subprocess.run([runtime.tool(tool), "--help"], capture_output=True, text=True, check=False)
    assert "usage" in (result.stdout + result.stderr).lower()


def test_the_converter_comes_with_its_modules() -> None:
    folder = runtime.converter_script().parent
    assert (folder / "conversion/base.py").is_file() and (folder / "gguf-py/gguf/__init__.py").is_file()


@pytest.mark.parametrize(
    "type_id, error", [(F32, 0.0), (F16, 1e-3), (Q8_0, 0.01), (Q6_K, 0.03), (TYPE_SPK4, 0.1)]
)
def test_quantize_and_dequantize(
    library: NativeLibrary, matrix: np.ndarray, type_id: int, error: float
) -> None:
    weights = matrix[:, :512]
    packed = library.quantize(type_id, weights)
    assert packed.shape == (200, library.row_bytes(type_id, 512)) and packed.dtype == np.uint8
    assert library.validate(type_id, packed)
    decoded = library.dequantize(type_id, packed, 512)
    assert np.linalg.norm(decoded - weights) <= error * np.linalg.norm(weights)


def test_importance_is_used(library: NativeLibrary, matrix: np.ndarray) -> None:
    importance = np.ones(576, np.float32)
    importance[:64] = 1e4
    plain, weighted = (library.quantize(TYPE_SPK4, matrix, given) for given in (None, importance))
    errors = [
        np.square(library.dequantize(TYPE_SPK4, packed, 576) - matrix)[:, :64].sum()
        for packed in (plain, weighted)
    ]
    assert errors[1] < errors[0]


def test_wrong_arguments_never_reach_ggml(library: NativeLibrary, matrix: np.ndarray) -> None:
    not_finite = matrix.copy()
    not_finite[7, 11] = np.nan
    cases = [
        (UnsupportedError, "no tensor type 77", lambda: library.quantize(77, matrix)),
        (UnsupportedError, "no tensor type -1", lambda: library.type_name(-1)),
        (
            UnsupportedError,
            "a row of 100 values does not fit",
            lambda: library.quantize(Q4_0, matrix[:, :100]),
        ),
        (UnsupportedError, "no quantizer for type q8_1", lambda: library.quantize(Q8_1, matrix)),
        (UnsupportedError, "no quantizer for type spka", lambda: library.quantize(TYPE_SPKA, matrix)),
        (UnsupportedError, "needs an importance", lambda: library.quantize(IQ2_XXS, matrix[:, :512])),
        (InputError, "importance must be 576", lambda: library.quantize(Q4_0, matrix, np.ones(5))),
        (InputError, "weight 11 of row 7 is not finite", lambda: library.quantize(Q8_0, not_finite)),
        (InputError, "must be a matrix", lambda: library.quantize(Q8_0, matrix[0])),
        (
            FormatError,
            "rows of 576 values have",
            lambda: library.dequantize(Q8_0, np.zeros((2, 5), np.uint8), 576),
        ),
        (
            InputError,
            "matrix of blocks",
            lambda: library.vec_dot(np.zeros((1, 9), BLOCK_SPKA), np.zeros((1, 9))),
        ),
        (
            InputError,
            "9 blocks per row, activations 8",
            lambda: library.vec_dot(np.zeros((1, 9), BLOCK_SPK4), np.zeros((1, 8), BLOCK_SPKA)),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_invalid_blocks_are_rejected(library: NativeLibrary, matrix: np.ndarray) -> None:
    packed = library.quantize(TYPE_SPK4, matrix)
    assert library.validate(TYPE_SPK4, packed)
    for place, change in ((0, (0xF0, 0x7F)), (72 + 3, (0xC0,))):  # a header, and a slot of another block
        damaged = packed.copy()
        damaged[3, place : place + len(change)] = change
        assert not library.validate(TYPE_SPK4, damaged)


def test_every_path_gives_the_same_product(
    library: NativeLibrary, matrix: np.ndarray, tokens: np.ndarray
) -> None:
    packed = library.quantize(TYPE_SPK4, matrix)
    spikes = library.encode_activations(tokens)
    expected = library.vec_dot(blocks_from_bytes(packed), spikes)
    exact = (
        library.decode_activations(spikes).astype(np.float64) @ library.dequantize(TYPE_SPK4, packed, 576).T
    )
    assert np.abs(expected - exact).max() < 1e-5 * np.abs(exact).max()
    assert "CPU_SPIKE" in buffer_types()
    for options in (
        {"buffer": "CPU"},
        {"buffer": "CPU", "threads": 3},
        {"buffer": "CPU", "use_reference": True},
        {"buffer": "CPU_SPIKE"},
        {"buffer": "CPU_SPIKE", "threads": 2},
    ):
        assert np.array_equal(mul_mat(TYPE_SPK4, packed, tokens, **options), expected), options


def test_encoder_settings_of_a_tensor_are_used(
    library: NativeLibrary, matrix: np.ndarray, tokens: np.ndarray
) -> None:
    packed = library.quantize(TYPE_SPK4, matrix)
    spikes = library.encode_activations(tokens, salience=3.0, silence=1.5)
    expected = library.vec_dot(blocks_from_bytes(packed), spikes)
    assert not np.array_equal(expected, mul_mat(TYPE_SPK4, packed, tokens))
    for buffer in ("CPU", "CPU_SPIKE"):
        result = mul_mat(TYPE_SPK4, packed, tokens, buffer=buffer, salience=3.0, silence=1.5)
        assert np.array_equal(result, expected)


@pytest.mark.parametrize(
    "type_id, buffer", [(TYPE_SPK4, "CPU"), (TYPE_SPK4, "CPU_SPIKE"), (Q4_0, "CPU"), (F32, "CPU")]
)
def test_products_routed_to_experts(
    library: NativeLibrary, matrix: np.ndarray, tokens: np.ndarray, type_id: int, buffer: str
) -> None:
    experts = np.stack([library.quantize(type_id, part) for part in np.split(matrix, 5)])
    ids = np.random.default_rng(5).permuted(np.tile(np.arange(5), (9, 1)), axis=1)[:, :2]
    routed = mul_mat_id(type_id, experts, tokens, ids, buffer=buffer, threads=2)
    per_expert = np.stack([tokens, tokens[::-1]], axis=1)
    routed_own = mul_mat_id(type_id, experts, per_expert, ids, buffer=buffer)
    for token, chosen in enumerate(ids):
        for slot, expert in enumerate(chosen):
            for result, x in ((routed, tokens[token]), (routed_own, per_expert[token, slot])):
                single = mul_mat(type_id, experts[expert], x)[0]
                assert np.allclose(result[token, slot], single, rtol=1e-5, atol=1e-4)
                if type_id == TYPE_SPK4:
                    assert np.array_equal(result[token, slot], single)


def test_repacked_weights_come_back_unchanged(library: NativeLibrary, matrix: np.ndarray) -> None:
    packed = library.quantize(TYPE_SPK4, matrix)
    with MatMul(TYPE_SPK4, packed, 576, 1, buffer="CPU_SPIKE") as product:
        assert np.array_equal(product.weight_bytes(), packed)


def test_a_product_can_be_computed_again(
    library: NativeLibrary, matrix: np.ndarray, tokens: np.ndarray
) -> None:
    packed = library.quantize(Q8_0, matrix)
    with MatMul(Q8_0, packed, 576, 9) as product:
        for x in (tokens, tokens[::-1]):
            product.set_input(x)
            assert product.compute() > 0
            decoded = library.dequantize(Q8_0, packed, 576)
            assert np.abs(product.output() - x @ decoded.T).max() < 0.02 * np.abs(x @ decoded.T).max()


@pytest.mark.parametrize("shared", [False, True])
def test_copies_have_inputs_of_their_own(
    library: NativeLibrary, matrix: np.ndarray, tokens: np.ndarray, shared: bool
) -> None:
    packed = library.quantize(TYPE_SPK4, matrix)
    alone = mul_mat(TYPE_SPK4, packed, tokens, buffer="CPU_SPIKE")
    options = {"buffer": "CPU_SPIKE", "copies": 3, "shared_weights": shared}
    with MatMul(TYPE_SPK4, packed, 576, 1, **options) as product:
        for last in (2, 5):  # the output is the last copy's
            product.set_input(tokens[last - 2 : last + 1, None])
            product.compute()
            assert np.array_equal(product.output(), alone[last : last + 1])
        with pytest.raises(InputError, match=r"has shape \(2, 1, 576\)"):
            product.set_input(tokens[:2, None])


def test_impossible_products_are_refused(
    library: NativeLibrary, matrix: np.ndarray, tokens: np.ndarray
) -> None:
    packed = library.quantize(Q8_0, matrix)
    cases = [
        (UnsupportedError, "no buffer type GPU", lambda: mul_mat(Q8_0, packed, tokens, buffer="GPU")),
        (
            UnsupportedError,
            "takes no such product",
            lambda: mul_mat(Q8_0, packed, tokens, buffer="CPU_SPIKE"),
        ),
        (InputError, "bytes per row", lambda: mul_mat(Q8_0, packed[:, 1:], tokens)),
        (InputError, "must be positive", lambda: mul_mat(Q8_0, packed, tokens, threads=0)),
        (
            InputError,
            "expert ids must be",
            lambda: mul_mat_id(Q8_0, packed[None], tokens, np.ones((9, 1), int)),
        ),
        (
            InputError,
            "that many experts",
            lambda: mul_mat_id(Q8_0, packed[None], tokens, np.ones((9, 2), int)),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    with MatMul(Q8_0, packed, 576, 9) as product:
        with pytest.raises(InputError, match=r"has shape \(8, 576\)"):
            product.set_input(tokens[:8])
        with pytest.raises(InputError, match="expert ids belong to a routed product"):
            product.set_input(tokens, np.zeros((9, 1)))


STOCK_BYTES = """
import hashlib, sys
from pathlib import Path
import numpy as np
from spikequant_gguf.ggml_api import buffer_types, mul_mat
from spikequant_gguf.native import NativeLibrary
library = NativeLibrary(Path(sys.argv[1]))
random = np.random.default_rng(6)
weights, x = random.standard_normal((64, 512), np.float32), random.standard_normal((7, 512), np.float32)
print("patched", library.patched)
for type_id in (0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 30, 34, 35, 39):
    packed = library.quantize(type_id, weights)
    product = mul_mat(type_id, packed, x, library=library)
    print(library.type_name(type_id), hashlib.sha256(packed).hexdigest(), hashlib.sha256(product).hexdigest())
for buffer in sorted(set(buffer_types(library)) & {"CPU_REPACK"}):
    product = mul_mat(2, library.quantize(2, weights), x, buffer=buffer, library=library)
    print(buffer, hashlib.sha256(product).hexdigest())
"""


def test_stock_types_give_the_bytes_of_an_unpatched_build(library: NativeLibrary) -> None:
    unpatched = find_unpatched()
    assert unpatched is not None, "run `spikequant build --unpatched`"
    outputs = []
    for folder in (library.library_dir, unpatched / "llama_cpp/lib"):
        command = [sys.executable, "-c", STOCK_BYTES, str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout.splitlines())
    assert outputs[0][0] == "patched True" and outputs[1][0] == "patched False"
    assert outputs[0][1:] == outputs[1][1:] and len(outputs[0]) > 18


# ---- the doctor


def checks() -> dict[str, doctor_module.Check]:
    return {check.name: check for check in doctor().checks}


def test_the_doctor_reports_a_good_installation() -> None:
    report = doctor()
    found = checks()
    assert found["runtime"].ok and found["tools"].ok and found["kernel"].ok
    assert patch_id() in found["patch"].value and VERSION in found["pin"].value
    document = json.loads(json.dumps(report.to_json()))
    assert {"name", "value", "ok", "remedy", "status"} == set(document["checks"][0])
    assert all(check.remedy for check in report.checks if check.ok is False)


def test_the_doctor_finds_a_bad_runtime(fake: FakeRuntime) -> None:
    fake.libraries(patch_id="0123456789ab")
    report = doctor()
    assert not report.ok
    assert (
        "0123456789ab" in checks()["runtime"].value and checks()["runtime"].remedy == "run `spikequant build`"
    )
    assert checks()["tools"].ok is False


def test_the_doctor_tells_whether_energy_can_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "POWERCAP", tmp_path)
    assert checks()["energy source"].status == "info"
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.mkdir(parents=True)  # cannot be read as a file, by no user
    (counter.parent / "name").write_text("package-0\n")
    (counter.parent / "max_energy_range_uj").write_text("262143328850\n")
    assert checks()["energy source"].status == "problem"
    counter.rmdir()
    counter.write_text("123456\n")
    assert checks()["energy source"].status == "ok" and "rapl" in checks()["energy source"].value


def test_the_doctor_names_missing_converter_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "_CONVERTER_PACKAGES", ("numpy", "no-such-package"))
    converter = checks()["converter"]
    assert "no-such-package" in converter.value and "numpy" not in converter.value
    assert "pip install spikequant-gguf[convert]" in str(converter.remedy)
