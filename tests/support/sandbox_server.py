"""Runs programs in the sandbox for the tests, as whichever user has started it: one request and one answer a line.

Needs nothing but the standard library and the directory of sapo on its path, so that a user who may read little else
can run it.
"""

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor

from sapo.sandbox import Limits, SandboxError, SandboxUnavailable, describe, run_program


def answer(request: dict) -> dict:
    if request["do"] == "describe":
        return {"backends": [dataclasses.asdict(report) for report in describe()]}
    if request["do"] == "run side by side":
        with ThreadPoolExecutor(len(request["runs"])) as threads:
            return {"results": list(threads.map(answer, request["runs"]))}
    limits = Limits(**request["limits"])
    try:
        result = run_program(request["source"], stdin=request["stdin"], limits=limits, backend=request["backend"])
    except (SandboxError, SandboxUnavailable) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {**dataclasses.asdict(result), "succeeded": result.succeeded, "reason": result.reason}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
