"""ONNX Runtime on the CPU, float32: MultiHeadAttention, opset-23 Attention, GroupQueryAttention with rotary, MatMul.

Only the session's run is timed; packing the inputs as the operators want them is not.
"""
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as P, helper as h

import peer

value = h.make_tensor_value_info
initializer = onnx.numpy_helper.from_array


def prepare(p):
    if p["dtype"] != "f32":
        raise peer.Unsupported(f"ONNX Runtime's fused attention on the CPU is float32 only, not {p['dtype']}")
    t = {}
    for name, (dtype, shape, data) in peer.read_tensors(p["inputs"]).items():
        if dtype != "F32":
            raise peer.Unsupported(f"input {name} is {dtype}; this peer reads F32")
        t[name] = np.frombuffer(data, np.float32).reshape(shape)
    studies = {
        ("attention", "mha"): attention, ("attention", "attention"): attention, ("attention", "gqa"): gqa_attention,
        ("decode", "gqa"): gqa_decode, ("block", "gqa"): block, ("qkv", "matmul"): qkv,
    }
    make = studies.get((p["study"], p["variant"]))
    if make is None:
        raise peer.Unsupported(f"ONNX Runtime has no {p['variant']} for {p['study']}")
    return f"ONNX Runtime {ort.__version__}", make(p, t), lambda path, result: write(p, path, result)


def sess(p, g, opset=23):
    m = h.make_model(g, opset_imports=[h.make_opsetid("", opset), h.make_opsetid("com.microsoft", 1)]); m.ir_version = 10
    o = ort.SessionOptions(); o.intra_op_num_threads = p["threads"]
    return ort.InferenceSession(m.SerializeToString(), o, providers=["CPUExecutionProvider"])


def tokens(x):
    """[B, H, S, D] as [B, S, H*D]."""
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(x.shape[0], x.shape[2], -1)


def heads(p, o):
    """[B, S, H*D] as [B, H, S, D]."""
    return o.reshape(o.shape[0], o.shape[1], p["heads"], p["head_dim"]).transpose(0, 2, 1, 3)


def attention(p, t):
    if p["past"]:
        raise peer.Unsupported("ONNX Runtime's attention peer takes no past; the study decode has one")
    if p["variant"] == "mha" and p["heads"] != p["kv_heads"]:
        raise peer.Unsupported("MultiHeadAttention has as many key/value heads as query heads; use gqa or attention")
    n, c = p["heads"], int(p["causal"])
    q, k, v = (tokens(t[i]) for i in "qkv")
    op, kw = {
        "mha": ("MultiHeadAttention", dict(domain="com.microsoft", num_heads=n, unidirectional=c)),
        "attention": ("Attention", dict(q_num_heads=n, kv_num_heads=p["kv_heads"], is_causal=c)),
    }[p["variant"]]
    io = [value(i, P.FLOAT, x.shape) for i, x in zip("qkv", (q, k, v))]; out = [value("o", P.FLOAT, q.shape)]
    s = sess(p, h.make_graph([h.make_node(op, ["q", "k", "v"], ["o"], **kw)], "g", io, out))
    return lambda: s.run(None, dict(q=q, k=k, v=v))[0]


def gqa_session(p, cos, sin, weights=None):
    """GroupQueryAttention over packed QKV; with weights, between the block's two MatMuls."""
    B, S, nk, d = p["batch"], p["seq"], p["kv_heads"], p["head_dim"]
    width = (p["heads"] + 2 * nk) * d
    names = [("x" if weights else "qkv", P.FLOAT, [B, S, p["hidden"] if weights else width]), ("pk", P.FLOAT, [B, nk, "p", d]),
             ("pv", P.FLOAT, [B, nk, "p", d]), ("sl", P.INT32, [B]), ("tl", P.INT32, [])]
    nodes = [h.make_node("GroupQueryAttention", ["qkv", "", "", "pk", "pv", "sl", "tl", "cos", "sin"], ["a" if weights else "o", "k", "v"],
                         domain="com.microsoft", num_heads=p["heads"], kv_num_heads=nk, do_rotary=1)]
    inits = [initializer(cos, "cos"), initializer(sin, "sin")]
    if weights:
        nodes = [h.make_node("MatMul", ["x", "wqkv"], ["qkv"])] + nodes + [h.make_node("MatMul", ["a", "wo"], ["o"])]
        inits += [initializer(np.ascontiguousarray(w.T), i) for i, w in zip(("wqkv", "wo"), weights)]
    return sess(p, h.make_graph(nodes, "g", [value(*i) for i in names], [value(i, P.FLOAT, None) for i in "okv"], inits))


def prefill(p, s, name, x):
    z = np.zeros((p["batch"], p["kv_heads"], 0, p["head_dim"]), np.float32)
    S = p["seq"]
    sl, tl = np.full(p["batch"], S - 1, np.int32), np.array(S, np.int32)
    return lambda: s.run(None, {name: x, "pk": z, "pv": z, "sl": sl, "tl": tl})[0]


def one_token(p, s, name, x, k, v, width):
    """`k` and `v` hold the past; the operator appends to one buffer, bound as both its input and its output."""
    B, L = p["batch"], k.shape[2] + 1
    room = lambda a: ort.OrtValue.ortvalue_from_numpy(np.concatenate((a, np.zeros_like(a[:, :, :1])), 2))
    K, V = room(k), room(v)
    o = ort.OrtValue.ortvalue_from_numpy(np.zeros((B, 1, width), np.float32))
    io = s.io_binding()
    io.bind_cpu_input(name, x); io.bind_ortvalue_input("pk", K); io.bind_ortvalue_input("pv", V)
    io.bind_cpu_input("sl", np.full(B, L - 1, np.int32)); io.bind_cpu_input("tl", np.array(L, np.int32))
    io.bind_ortvalue_output("o", o); io.bind_ortvalue_output("k", K); io.bind_ortvalue_output("v", V)

    def call():
        s.run_with_iobinding(io)
        return o
    return call


def still(p, L):
    """Rotary tables that turn nothing: the operator does its rotary work and the result stays comparable."""
    return np.ones((L, p["head_dim"] // 2), np.float32), np.zeros((L, p["head_dim"] // 2), np.float32)


def gqa_attention(p, t):
    if not p["causal"] or p["past"]:
        raise peer.Unsupported("GroupQueryAttention is measured causal and without a past")
    x = np.concatenate([tokens(t[i]) for i in "qkv"], -1)
    return prefill(p, gqa_session(p, *still(p, p["seq"])), "qkv", x)


def gqa_decode(p, t):
    q, k, v = t["q"], t["k"], t["v"]
    p = dict(p, seq=1)
    x = np.concatenate([tokens(q), tokens(k[:, :, -1:]), tokens(v[:, :, -1:])], -1)
    return one_token(p, gqa_session(p, *still(p, k.shape[2])), "qkv", x, k[:, :, :-1], v[:, :, :-1], q.shape[1] * q.shape[3])


def block(p, t):
    unknown = set(t) - {"x", "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "past_k", "past_v"}
    if unknown:
        raise peer.Unsupported(f"ONNX Runtime's block has no input {', '.join(sorted(unknown))}")
    if not p["causal"]:
        raise peer.Unsupported("GroupQueryAttention is causal")
    S, d, past = p["seq"], p["head_dim"], p["past"]
    if past and S != 1:
        raise peer.Unsupported(f"ONNX Runtime's block over a cache takes one new token, not {S}")
    L = S + past
    e = np.outer(np.arange(L), 1 / (10000 ** (np.arange(0, d, 2) / d)))
    tables = (np.cos(e).astype(np.float32), np.sin(e).astype(np.float32)) if p["rope"] else still(p, L)
    s = gqa_session(p, *tables, weights=(np.concatenate([t[f"{i}_proj.weight"] for i in "qkv"]), t["o_proj.weight"]))
    if past:
        return one_token(p, s, "x", t["x"], t["past_k"], t["past_v"], p["hidden"])
    return prefill(p, s, "x", t["x"])


def qkv(p, t):
    x = t["x"]
    B = np.ascontiguousarray(np.concatenate([t[f"{i}_proj.weight"] for i in "qkv"]).T)
    g = h.make_graph([h.make_node("MatMul", ["a", "b"], ["c"])], "g", [value("a", P.FLOAT, x.shape)],
                     [value("c", P.FLOAT, [*x.shape[:-1], B.shape[1]])], [initializer(B, "b")])
    s = sess(p, g)
    return lambda: s.run(None, {"a": x})[0]


def write(p, path, result):
    y = result.numpy() if isinstance(result, ort.OrtValue) else result
    if p["study"] in ("attention", "decode"):
        y = heads(p, y)
    y = np.ascontiguousarray(y, np.float32)
    peer.write_y(path, y.shape, y.ctypes.data, y.nbytes)


peer.serve(prepare)
