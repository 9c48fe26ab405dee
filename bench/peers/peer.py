"""What every Python peer has in common: safetensors files and the conversation with the parent.

The parent writes one JSON line with the problem. The peer loads the inputs, warms up and answers {"ready": true, "version": ...}
or {"error": ...}. Then each line "run" makes one timed call and answers {"seconds": ...}; {"output": path} writes the last
result there as tensor "y" in float32 and answers {"written": path}; "quit" or the end of the input ends the peer.
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


def serve(prepare):
    """`prepare(problem)` gives (version, call, write): `call()` is timed, `write(path, result)` stores what it returned."""
    # Libraries print to stdout; the conversation keeps a copy of it for itself.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields):
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    try:
        version, call, write = prepare(json.loads(sys.stdin.readline()))
        for _ in range(2):
            result = call()
    except BaseException as e:
        text = " ".join(str(e).split())[:300]
        answer(error=text if isinstance(e, Unsupported) else f"{type(e).__name__}: {text}")
        return
    answer(ready=True, version=version)
    for line in sys.stdin:
        line = line.strip()
        try:
            if line == "quit":
                return
            if line == "run":
                result = None
                start = time.perf_counter()
                result = call()
                answer(seconds=time.perf_counter() - start)
            else:
                path = json.loads(line)["output"]
                write(path, result)
                answer(written=path)
        except Exception as e:
            answer(error=f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
