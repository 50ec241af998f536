"""Kernels of every instruction set, compiled alone: the integers of plain C, and no multiplication.

What a machine cannot run is compiled and looked at all the same, and named in the summary of the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from disassembly import functions, is_multiplication, multiplications
from native_build import (
    DEBIAN_PACKAGES,
    KERNELS,
    build,
    cpu_runs,
    host_architecture,
    target_of,
)

from spikequant_gguf.native import load
from spikequant_gguf.runtime import RuntimeInfo

ARCHITECTURES = list(dict.fromkeys((host_architecture(), "aarch64")))
CASES = [(architecture, kernel) for architecture in ARCHITECTURES for kernel in KERNELS[architecture]]
OBJECTS = {"plain-c": "spike-plain", "avx2": "spike-avx2", "avx512": "spike-avx512", "neon": "spike-neon"}
LEAST_PRODUCTS = 500
PROMPT_SUBJECTS = {"prompts", "looks", "lists"}
LINE_SUBJECTS = {"salients", "transpositions"}
WITHOUT_LINES = {"avx512"}  # looks every token's values up
OWN_LOOKS = {"avx2", "avx512"}  # several tokens at a time; the others go one by one
REQUEST_LINES = {"avx2"}  # while those of a prompt are added
# by the end of the file's name, the functions that accumulate
ACCUMULATING = {
    "": {"integrate", "integrate_half", "add_salient"},
    "-prompt": {"integrate_schedule", "integrate_half_schedule"},
}
ALLOWED_CALLS = {"memset", "memcpy", "__stack_chk_fail"}
TABLES = {"spike_pack"}  # of another file: their addresses look like those of functions


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """check_kernels of an architecture. What is missing for a foreign one is said in the summary."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        target = target_of(architecture)
        if architecture != host_architecture() and target.missing:
            pytest.skip(
                f"NOT TESTED: {architecture} kernels, for want of {', '.join(target.missing)}; on Debian or "
                f"Ubuntu: sudo apt install {DEBIAN_PACKAGES}"
            )
        if architecture not in made:
            made[architecture] = build(target, tmp_path_factory.mktemp(architecture)) / "check_kernels"
        return made[architecture]

    return make


@cache
def report_of(program: Path, architecture: str, kernel: str) -> dict[str, tuple[int, int, str]]:
    """What the program compared, by subject: number, how many were wrong, rest of the line."""
    command = [*target_of(architecture).run, program, kernel]
    environment = os.environ | {"SPIKEQUANT_FORCE_ISA": kernel}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return subjects_in(done.stdout)


def subjects_in(output: str) -> dict[str, tuple[int, int, str]]:
    """report_of what was printed."""
    lines = re.findall(r"^(\w+) (\d+)(?: valid \d+)? wrong (\d+) ?(.*)$", output, re.M)
    return {subject: (int(number), int(wrong), rest) for subject, number, wrong, rest in lines}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of this machine's native programs with sanitizers, which end them at the first finding."""

    @cache
    def make(sanitizers: str) -> Path:
        folder = tmp_path_factory.mktemp(sanitizers.replace(",", "-"))
        return build(target_of(host_architecture()), folder, sanitizers)

    return make


def kernel_object(program: Path, name: str) -> Path:
    (found,) = program.parent.rglob(f"{name}.c.o*")
    return found


@pytest.mark.parametrize(("architecture", "kernel"), CASES)
def test_kernels_equal_plain_c(program: Callable[[str], Path], architecture: str, kernel: str) -> None:
    built = program(architecture)
    if architecture == host_architecture() and not cpu_runs(kernel):
        pytest.skip(f"NOT RUN, only compiled and disassembled: this CPU has no {kernel}")
    report = report_of(built, architecture, kernel)
    assert report["products"][0] >= LEAST_PRODUCTS and report["products"][1] == 0
    for subject in ("salients", "lists", "blocks"):
        assert report[subject][0] > 0 and report[subject][1] == 0
    report = report_of(built.with_name("check_prompts"), architecture, kernel)
    lines = set() if kernel in WITHOUT_LINES else LINE_SUBJECTS
    assert report["prompts"][0] >= LEAST_PRODUCTS and set(report) == PROMPT_SUBJECTS | lines
    assert all(number > 0 and wrong == 0 for number, wrong, _ in report.values())


@pytest.mark.parametrize("kernel", KERNELS[host_architecture()])
@pytest.mark.parametrize(
    ("sanitizers", "name"),
    [
        ("address,undefined", "check_kernels"),
        ("address,undefined", "check_prompts"),
        ("address,undefined", "check_threads"),
        ("thread", "check_threads"),
    ],
)
def test_sanitizers_find_nothing(
    sanitized: Callable[[str], Path], sanitizers: str, name: str, kernel: str
) -> None:
    """No access out of bounds, no leak, no undefined behaviour, no data race: each would end the program."""
    built = sanitized(sanitizers)
    if not cpu_runs(kernel):
        pytest.skip(f"NOT RUN with sanitizers: this CPU has no {kernel}")
    report = report_of(built / name, host_architecture(), kernel)
    assert report and all(number > 0 and wrong == 0 for number, wrong, _ in report.values())


def test_encoder_gives_the_same_bytes_everywhere(program: Callable[[str], Path]) -> None:
    reports = [report_of(program(each), each, "plain-c")["encoder"] for each in ARCHITECTURES]
    assert all(report == reports[0] for report in reports)
    assert reports[0][0] >= 100 and reports[0][1] == 0 and "digest" in reports[0][2]


@pytest.mark.skipif(host_architecture() != "x86_64", reason="about x86 CPUs")
@pytest.mark.parametrize("name", ["check_kernels", "check_prompts", "check_threads"])
def test_a_cpu_with_sse4_but_without_avx_gives_the_same(program: Callable[[str], Path], name: str) -> None:
    """It loads the code for newer CPUs, too, chooses plain C by itself, and encodes to the same bytes."""
    emulator = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("NOT RUN for want of qemu-x86_64; on Debian or Ubuntu: sudo apt install qemu-user-static")
    built = program("x86_64").with_name(name)
    environment = {key: value for key, value in os.environ.items() if key != "SPIKEQUANT_FORCE_ISA"}
    command = [emulator, "-cpu", "Nehalem", built, "plain-c"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    here = report_of(built, "x86_64", "plain-c")
    assert here and here.items() <= subjects_in(done.stdout).items()
    assert all(wrong == 0 for _, wrong, _ in here.values())


def test_unknown_kernel_is_refused(program: Callable[[str], Path]) -> None:
    command = [program(host_architecture()), "abacus"]
    environment = os.environ | {"SPIKEQUANT_FORCE_ISA": "abacus"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2 and "runs no kernel named 'abacus'" in done.stderr


@pytest.mark.parametrize(("architecture", "kernel"), CASES)
@pytest.mark.parametrize(("part", "names"), ACCUMULATING.items())
def test_kernels_only_add(
    program: Callable[[str], Path], architecture: str, kernel: str, part: str, names: set[str]
) -> None:
    """Address computations count, too."""
    file = kernel_object(program(architecture), OBJECTS[kernel] + part)
    found = functions(target_of(architecture).objdump, file)
    assert names <= {name for name, _, _ in found}
    for name, instructions, calls in found:
        assert len(instructions) > 5, name
        assert not multiplications(instructions), name
        assert calls <= ALLOWED_CALLS | TABLES, f"{name} calls what was not looked at"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("file", "function"),
    [("spike-potentials", "spike_potentials_of_row"), ("spike-activations", "spike_encode_token")],
)
def test_products_are_found_where_they_are(
    program: Callable[[str], Path], architecture: str, file: str, function: str
) -> None:
    """The dot product of stored rows and the encoder multiply; a search that misses that proves nothing."""
    found = functions(target_of(architecture).objdump, kernel_object(program(architecture), file))
    assert any(name.startswith(function) and multiplications(code) for name, code, _ in found)


def test_installed_kernels_only_add(runtime: RuntimeInfo) -> None:
    """The library that models run with, compiled for this very CPU."""
    library = load().library_dir / "libggml-cpu.so"
    found = functions("objdump", library)
    built = set(KERNELS[host_architecture()])
    owners = {name: built for name in set().union(*ACCUMULATING.values())}
    owners |= {"add_salient_lines": built - WITHOUT_LINES, "add_salient_tokens": built & OWN_LOOKS}
    owners |= {"integrate_schedule_ahead": built & REQUEST_LINES}
    for name, own in owners.items():
        kernels = [code for each, code, _ in found if each == name]
        assert len(kernels) == len(own), name
        assert not any(map(multiplications, kernels)), name
    dot = [code for name, code, _ in found if name == "spike_potentials_of_row"]
    assert dot and multiplications(dot[0])


@pytest.mark.parametrize(
    "mnemonic",
    "imul mul mulx mulss vmulps vpmulld pmulhrsw pmuludq pmaddwd vpmaddubsw vpmadd52luq vpdpbusd "
    "vpdpwssds vpdpbssd dpps vdpps vdppd vdpbf16ps tdpbusd vfmadd231ps vfnmadd132sd vfmsub213ss "
    "vfmaddsub132pd pclmulqdq vfmulcph "
    "madd msub mneg smull smulh umulh umaddl smsubl smnegl mla mls smlal smlal2 umlsl sqdmull sqrdmulh pmull "
    "fmul fmla fmls fmadd fmsub fnmadd fnmul fmulx fcmla fmlal bfmlalb sdot udot usdot sudot bfdot fdot "
    "smmla ummla usmmla bfmmla fmmla fmopa smopa".split(),
)
def test_multiplications_are_known(mnemonic: str) -> None:
    assert is_multiplication(mnemonic)


@pytest.mark.parametrize(
    "mnemonic",
    "add sub lea mov movdqu vpaddb vpsubw vpsrlw vpandq paddd vpshufb vpermb vpsignb vpblendvb shl sar jmp "
    "call ret vpmovsxwd vpunpcklwd vinserti128 test cmp kmovq ldp stp ldr ldur adds uaddw2 saddw usubw usra "
    "ushr ssra movi dup tbl cmeq and bl b.ne ubfiz umov smov sxtw umax addp saddlp cmovle setle neg".split(),
)
def test_additions_are_no_multiplications(mnemonic: str) -> None:
    assert not is_multiplication(mnemonic)
