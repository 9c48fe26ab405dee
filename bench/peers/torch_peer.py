"""PyTorch on the CPU. The lines between "measured" and "end" are what a PyTorch user writes; nothing else is timed."""
import math

import torch
import torch.nn.functional as F

import peer

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
COMPUTE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def rot(x): a, b = x.chunk(2, -1); return torch.cat((-b, a), -1)


def prepare(p):
    torch.set_grad_enabled(False)
    torch.set_num_threads(p["threads"])
    dt = COMPUTE[p["dtype"]]
    t = {
        name: torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape).to(dt)
        for name, (dtype, shape, data) in peer.read_tensors(p["inputs"]).items()
    }
    study = {"block": block, "attention": attention, "decode": decode, "qkv": qkv}[p["study"]]
    return f"PyTorch {torch.__version__}", study(p, t, dt), write


def pick(p, variants):
    if p["variant"] not in variants:
        raise peer.Unsupported(f"PyTorch's {p['study']} has the variants {', '.join(variants)}, not {p['variant']}")
    fn = variants[p["variant"]]
    return torch.compile(fn) if p["variant"] == "compiled" else fn


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
    return pick(p, {"sdpa": layer, "compiled": layer})


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


def write(path, result):
    y = torch.cat(result, -1) if isinstance(result, list) else result
    y = y.float().contiguous()
    peer.write_y(path, y.shape, y.data_ptr(), y.numel() * 4)


peer.serve(prepare)
