"""fault_worker.py SOURCE: converts under tests/native/faults.c, each time in a forked process.

It is started with that library preloaded. A request is a line of JSON on stdin: the output's path, the fault,
and options; the answer a line with the exit status, the signal, the message, and how many calls were counted.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

from converter_models import NumpyBackend

from spikequant_gguf import SpikeQuantError
from spikequant_gguf.converter import ConvertOptions, Recipe, Scaling, convert

INTERNAL_ERROR = 99


def convert_once(source: str, request: dict) -> dict:
    """Runs in a forked process."""
    faults = ctypes.CDLL(None)
    faults.faults_calls.restype = ctypes.c_long
    out = Path(request["out"])
    faults.faults_arm(
        str(out.parent).encode(), request["kind"], ctypes.c_long(request["number"]), request["error"]
    )
    options = ConvertOptions(threads=1, silence=request.get("silence", 0.5), resume=request["resume"])

    def calibrate(opened, planned, progress):
        scale = Scaling(inputs=None, outputs=None)
        return Recipe(
            calibration=request.get("calibration", "a text"), transforms={"token_embd.weight": scale}
        )

    try:
        report = convert(source, out, options, calibrate=calibrate, backend=NumpyBackend())
        return {"status": 0, "resumed": report.resumed, "calls": faults.faults_calls()}
    except SpikeQuantError as error:
        return {"status": error.exit_code, "message": error.message, "remedy": error.remedy}
    except BaseException:
        return {"status": INTERNAL_ERROR, "message": traceback.format_exc(), "remedy": None}


def main() -> None:
    source = sys.argv[1]
    for line in sys.stdin:
        with tempfile.TemporaryFile() as answer:
            child = os.fork()
            if child == 0:
                text = json.dumps(convert_once(source, json.loads(line)))
                answer.write(text.encode())
                answer.flush()
                os._exit(0)
            _, status = os.waitpid(child, 0)
            answer.seek(0)
            text = answer.read().decode()
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        print(json.dumps({"signal": killed, **(json.loads(text) if text and not killed else {})}), flush=True)


if __name__ == "__main__":
    main()
