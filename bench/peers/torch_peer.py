"""PyTorch on the CPU or a GPU. The lines between "measured" and "end" are what a PyTorch user writes; nothing else is timed."""
import gc
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import peer

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
COMPUTE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def rot(x): a, b = x.chunk(2, -1); return torch.cat((-b, a), -1)


# Tensors of the inputs, which the problems on a GPU share.
LOADED = {}


def prepare(p):
    torch.set_grad_enabled(False)
    torch.set_num_threads(p["threads"])
    dt, dev = COMPUTE[p["dtype"]], torch.device(p.get("device", "cpu"))
    on_gpu = dev.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise peer.Unsupported("this PyTorch sees no GPU")
    key = (p["inputs"], dt)
    if key not in LOADED:
        LOADED[key] = {
            name: torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape).to(dev).to(dt)
            for name, (dtype, shape, data) in peer.read_tensors(p["inputs"]).items()
        }
    t = dict(LOADED[key])
    study = {"block": block, "attention": attention, "decode": decode, "qkv": qkv, "softmax": softmax, "rope": rope}[p["study"]]
    if not on_gpu:
        LOADED.clear()
        return f"PyTorch {torch.__version__}", study(p, t, dt), write
    for name, x in t.items():
        copies = 1 if name.endswith((".weight", ".bias")) else p["batch"] // x.shape[0]
        if copies > 1:
            # Sequences beyond those in the file repeat them.
            t[name] = LOADED[key][name] = x.repeat(copies, *[1] * (x.dim() - 1))
    with dev:
        call = study(p, t, dt)
    call = OnGpu(call, eager=p["variant"] == "traditional")
    heads_first = p["study"] in ("attention", "decode", "rope")
    return f"PyTorch {torch.__version__}, {call.form}", call, lambda path, result, rows: write_rows(path, result, rows, heads_first)


class OnGpu:
    """A call on a GPU, as a CUDA graph where it can be one and `eager` does not say otherwise.

    A timed call is the mean of as many in a row as fill 2 ms, by the GPU's own clock, over results that were NaN before."""

    def __init__(self, fn, eager):
        # A graph reads the weights and tables that the function holds, also when the function itself is no longer called.
        self.fn, self.call, self.result, self.form = fn, fn, None, "eager"
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                fn()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        if eager:
            return
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.result = fn()
            self.call, self.form = graph.replay, "CUDA graph"
        except Exception as e:
            torch.cuda.synchronize()
            self.result, self.form = None, f"eager, as no CUDA graph can be made: {' '.join(str(e).split())[:100]}"

    def __call__(self):
        result = self.call()
        return self.result if self.form == "CUDA graph" else result

    def lap(self, times):
        if self.result is not None:
            for x in self.result if isinstance(self.result, list) else [self.result]:
                x.fill_(math.nan)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            result = self()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / times, result

    def timed(self):
        seconds, result = self.lap(1)
        return self.lap(math.ceil(2e-3 / max(seconds, 1e-6))) if seconds < 2e-3 else (seconds, result)


def release():
    LOADED.clear()
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


BACKENDS = {"sdpa-cudnn": "CUDNN_ATTENTION", "sdpa-flash": "FLASH_ATTENTION", "sdpa-efficient": "EFFICIENT_ATTENTION"}


def pick(p, variants, compiled="sdpa-cudnn"):
    """The variant that is asked for. On a GPU `sdpa` is there once for each kernel of PyTorch's, and under `torch.compile` with the one that
    `compiled` names."""
    name, on_gpu = p["variant"], p.get("device", "cpu").startswith("cuda")
    fn = variants.get("sdpa" if on_gpu and name in BACKENDS else name)
    if fn is None:
        raise peer.Unsupported(f"PyTorch's {p['study']} has the variants {', '.join(variants)}, not {name}")
    if not on_gpu:
        return torch.compile(fn) if name == "compiled" else fn
    if name == "compiled":
        # One shape each: without guards for others.
        fn = torch.compile(fn, dynamic=False)
        name = "sdpa-efficient" if compiled and p["dtype"] == "f32" else compiled
    if name not in BACKENDS:
        return fn
    backend = getattr(SDPBackend, BACKENDS[name])

    def with_backend():
        with sdpa_kernel(backend):
            return fn()
    return with_backend


def rope_tables(start, end, d, dt):
    inv = 1 / (10000 ** (torch.arange(0, d, 2).float() / d)); e = torch.outer(torch.arange(start, end).float(), inv); e = torch.cat((e, e), -1)
    return e.cos().to(dt), e.sin().to(dt)


def block(p, t, dt):
    B, S, H, n, nk, d, L = p["batch"], p["seq"], p["hidden"], p["heads"], p["kv_heads"], p["head_dim"], p["past"]
    x = t.pop("x"); W = [t.pop(f"{i}_proj.weight") for i in "qkvo"]; Wqkv = torch.cat(W[:3]); Wo = W[3]
    b = [t.pop(f"{i}_proj.bias", None) for i in "qkvo"]; bo = b[3]
    bqkv = None
    if any(i is not None for i in b[:3]):
        bqkv = torch.cat([torch.zeros(w.shape[0], dtype=dt) if i is None else i for i, w in zip(b, W[:3])])
    past = [t.pop(i, None) for i in ("past_k", "past_v")]
    if t:
        raise peer.Unsupported(f"PyTorch's block has no input {', '.join(t)}")
    if L:
        return block_at_decode(p, x, Wqkv, bqkv, Wo, bo, past, dt)
    causal, rope = p["causal"], p["rope"]
    c, s = rope_tables(0, S, d, dt)
    m = torch.tril(torch.ones(S, S, dtype=torch.bool))
    sh = lambda t: t.view(B, S, -1, d).transpose(1, 2)

    # measured
    def trad():
        q, k, v = (sh(F.linear(x, w, i)) for w, i in zip(W[:3], b))
        if rope: q, k = q*c + rot(q)*s, k*c + rot(k)*s
        if nk != n: k, v = (i.repeat_interleave(n // nk, 1) for i in (k, v))
        sc = (q @ k.transpose(-2, -1)) / math.sqrt(d)
        if causal: sc = sc.masked_fill(~m, float("-inf"))
        return F.linear((F.softmax(sc, -1) @ v).transpose(1, 2).reshape(B, S, n*d), Wo, bo)
    def sdpa():
        if nk == n: q, k, v = F.linear(x, Wqkv, bqkv).view(B, S, 3, n, d).permute(2, 0, 3, 1, 4)
        else: q, k, v = F.linear(x, Wqkv, bqkv).view(B, S, n+2*nk, d).transpose(1, 2).split((n, nk, nk), 1)
        if rope: q, k = q*c + rot(q)*s, k*c + rot(k)*s
        return F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=nk != n).transpose(1, 2).reshape(B, S, n*d), Wo, bo)
    # end
    return pick(p, {"traditional": trad, "sdpa": sdpa, "compiled": sdpa})


def block_at_decode(p, x, Wqkv, bqkv, Wo, bo, past, dt):
    b, n, nk, d, L = p["batch"], p["heads"], p["kv_heads"], p["head_dim"], p["past"]
    if p["seq"] != 1:
        raise peer.Unsupported(f"PyTorch's block over a cache takes one new token, not {p['seq']}")
    K, V = (torch.cat((i, torch.zeros(b, nk, 1, d, dtype=dt)), 2) for i in past)
    c, si = rope_tables(L, L + 1, d, dt)
    rope = (lambda x, c, s: x * c + rot(x) * s) if p["rope"] else (lambda x, c, s: x)

    # measured
    def layer():
        q, k, v = F.linear(x, Wqkv, bqkv).view(b, 1, n+2*nk, d).transpose(1, 2).split((n, nk, nk), 1)
        K[:, :, L:L+1] = rope(k, c, si); V[:, :, L:L+1] = v
        o = F.scaled_dot_product_attention(rope(q, c, si), K, V, enable_gqa=nk != n)
        return F.linear(o.transpose(1, 2).reshape(b, 1, n*d), Wo, bo)
    # end
    return pick(p, {"sdpa": layer, "compiled": layer}, compiled="sdpa-flash")


def attention(p, t, dt):
    q, k, v, c, d, S = t["q"], t["k"], t["v"], p["causal"], p["head_dim"], p["seq"]
    if p["past"]:
        raise peer.Unsupported("PyTorch's attention peer takes no past; the study decode has one")
    gqa = p["heads"] != p["kv_heads"]
    r = p["heads"] // p["kv_heads"]
    m = torch.tril(torch.ones(S, S, dtype=torch.bool))

    # measured
    def trad():
        kk, vv = (i.repeat_interleave(r, 1) for i in (k, v)) if gqa else (k, v)
        sc = (q @ kk.transpose(-2, -1)) / math.sqrt(d)
        if c: sc = sc.masked_fill(~m, float("-inf"))
        return F.softmax(sc, -1) @ vv
    sdpa = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=c, enable_gqa=gqa)
    # end
    return pick(p, {"traditional": trad, "sdpa": sdpa, "compiled": sdpa})


def decode(p, t, dt):
    q, k, v = t["q"], t["k"], t["v"]
    # measured
    sdpa = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    # end
    return pick(p, {"sdpa": sdpa, "compiled": sdpa})


def qkv(p, t, dt):
    x = t["x"]; W = [t[f"{i}_proj.weight"] for i in "qkv"]; w = torch.cat(W)
    # measured
    sep = lambda: [F.linear(x, w) for w in W]
    fus = lambda: F.linear(x, w)
    # end
    return pick(p, {"separate": sep, "fused": fus})


def softmax(p, t, dt):
    x = t["x"]
    # measured
    def trad():
        mx = x.max(-1, keepdim=True)[0]; e = torch.exp(x - mx)
        return e / e.sum(-1, keepdim=True)
    fused = lambda: F.softmax(x, -1)
    # end
    return pick(p, {"traditional": trad, "fused": fused, "compiled": fused}, compiled=None)


def rope(p, t, dt):
    x = t["x"]
    c, s = rope_tables(p["past"], p["past"] + p["seq"], p["head_dim"], dt)
    # measured
    trad = lambda: x * c + rot(x) * s
    # end
    return pick(p, {"traditional": trad, "compiled": trad}, compiled=None)


def write_rows(path, result, rows, heads_first):
    """Of the result as rows: of tokens, or of what else its last dimension is."""
    y = torch.cat(result, -1) if isinstance(result, list) else result
    if heads_first:
        y = y.transpose(1, 2).flatten(2)
    if rows is not None:
        y = y.reshape(-1, y.shape[-1])[torch.tensor(rows, device=y.device)]
    write(path, y.cpu())


def write(path, result):
    y = torch.cat(result, -1) if isinstance(result, list) else result
    y = y.float().contiguous()
    peer.write_y(path, y.shape, y.data_ptr(), y.numel() * 4)


peer.serve(prepare, release)
