"""What every Python peer has in common: safetensors files and the conversation with the parent.

The parent writes one JSON line with the problem. The peer loads the inputs, warms up and answers {"ready": true, "version": ...}
or {"error": ...}. Then each line "run" makes one timed call and answers {"seconds": ...}; {"output": path} writes the last
result there as tensor "y" in float32 and answers {"written": path}; "quit" or the end of the input ends the peer.

On a GPU one peer serves many problems, also after one that it could not compute: each further line with a problem is answered like the
first, {"run": n} calls problem n, counted from 0, {"output": path, "problem": n, "rows": [...]} writes those rows of its last result, all
where rows is null, and {"forget": true} frees all problems and answers {"forgotten": true}.
"""
import ctypes
import json
import os
import struct
import sys
import time


def read_tensors(path):
    """Name -> (dtype name, shape, bytes)."""
    with open(path, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        data = bytearray(f.read())
    header.pop("__metadata__", None)
    view = memoryview(data)
    return {name: (t["dtype"], t["shape"], view[slice(*t["data_offsets"])]) for name, t in header.items()}


def write_y(path, shape, address, nbytes):
    """Writes the float32 numbers at `address` as tensor "y"."""
    header = json.dumps({"y": {"dtype": "F32", "shape": list(shape), "data_offsets": [0, nbytes]}}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header + ctypes.string_at(address, nbytes))


class Unsupported(Exception):
    """The peer has no way to compute the problem."""


def serve(prepare, release=lambda: None):
    """`prepare(problem)` gives (version, call, write): `call()` is timed, `write(path, result)` stores what it returned.

    Where `call` has `timed()`, that gives seconds and result instead. `release()` gives memory of forgotten problems back."""
    # Libraries print to stdout; the conversation keeps a copy of it for itself.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields):
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    problems = []

    def explain(e):
        text = " ".join(str(e).split())[:300]
        return text if isinstance(e, Unsupported) else f"{type(e).__name__}: {text}"

    def load(p):
        problems.append(None)
        version, call, write = prepare(p)
        for _ in range(2):
            result = call()
        problems[-1] = [call, write, result]
        answer(ready=True, version=version)

    def run(problem):
        call = problem[0]
        # What keeps its results in place is timed by itself, on the device's clock.
        if hasattr(call, "timed"):
            seconds, problem[2] = call.timed()
        else:
            problem[2] = None
            start = time.perf_counter()
            problem[2] = call()
            seconds = time.perf_counter() - start
        answer(seconds=seconds)

    first = json.loads(sys.stdin.readline())
    try:
        load(first)
    except BaseException as e:
        answer(error=explain(e))
        if not first.get("device", "cpu").startswith("cuda"):
            return
    for line in sys.stdin:
        line = line.strip()
        try:
            if line == "quit":
                return
            order = {"run": 0} if line == "run" else json.loads(line)
            if "study" in order:
                load(order)
            elif "forget" in order:
                problems.clear()
                release()
                answer(forgotten=True)
            elif "run" in order:
                run(problems[order["run"]])
            else:
                _, write, result = problems[order.get("problem", 0)]
                write(order["output"], result, *([order["rows"]] if "rows" in order else []))
                answer(written=order["output"])
        except Exception as e:
            answer(error=explain(e))
