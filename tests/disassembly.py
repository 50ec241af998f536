"""Machine code by function, and which of its instructions multiply."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

# Products, fused or not, of integers or floats, dot products and their matrix forms; x86 and aarch64.
# Carry-less and Galois-field products (pclmul, gf2p8mul) count as well: adding has no use for them.
_MULTIPLIES = re.compile(
    r".*mul"  # imul, mulss, vpmulld, smull, fmulx, pmull
    r"|.*madd|.*msub|.*nmadd|.*nmsub"  # pmaddubsw, vfmadd231ps, vpmadd52luq, madd, smaddl, fmsub
    r"|.*ml[as]"  # mla, fmls, smlal, fmlal2, bfmlalb
    r"|v?dpp[sd]|v?p?dp\w*(bu|wu|bs|ws|bf|ph|ss)\w*|tdp"  # dpps, vpdpbusd, vdpbf16ps, tdpbssd
    r"|[us]*dot|usdot|bfdot|fdot"  # sdot, udot
    r"|s?mneg|[us]mnegl|.*mmla|[fsub]+mop[as]"  # mneg, smmla, fmopa
)
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_INSTRUCTION = re.compile(r"^\s+[0-9a-f]+:\t(\S.*)$")
_CALL = re.compile(r"R_(?:X86_64_PLT32|X86_64_PC32|AARCH64_CALL26|AARCH64_JUMP26)\s+([A-Za-z_]\w*)")
_PREFIXES = ("lock", "rep", "repz", "repnz", "bnd", "notrack", "data16", "cs", "ds", "{vex}", "{evex}")


def is_multiplication(mnemonic: str) -> bool:
    return _MULTIPLIES.match(mnemonic.lower()) is not None


def functions(objdump: str, file: Path) -> list[tuple[str, list[str], set[str]]]:
    """Of every function: name, instructions (mnemonic and operands) and names that it calls outside its file.

    Static functions of several files may share a name.
    """
    command = [objdump, "--disassemble", "--no-show-raw-insn", "--reloc", "--demangle", "--wide", file]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: list[tuple[str, list[str], set[str]]] = []
    for line in text.splitlines():
        if function := _FUNCTION.match(line):
            found.append((function[1], [], set()))
        elif found and (call := _CALL.search(line)):
            found[-1][2].add(call[1])
        elif found and (instruction := _INSTRUCTION.match(line)):
            words = instruction[1].split()
            while len(words) > 1 and words[0] in _PREFIXES:
                words.pop(0)
            found[-1][1].append(" ".join(words))
    return found


def multiplications(instructions: list[str]) -> list[str]:
    return [text for text in instructions if is_multiplication(text.split()[0])]
