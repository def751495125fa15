"""
A llama with ARMT memory written for training on few short segments: the equations of `modeling_armt` (check.py holds
it to them), but a layer's memory is the list of what was written, A = sum_j k_j u_j^T with u = beta (v - v0), so that
the K x D matrix is never formed: a read is (q K^T) U / (q . z + eps). LoRA is merged into the weights once a step, in
one product for all layers. `SmolLM2` reads the packed blocks that prepare.py writes.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


TARGETS = "qkvogud"  # query, key, value, output, gate, up and down projections


def dequantized(kind, data):
    """GGUF blocks as float32: rows of 32-value blocks with one (Q8_0) or two (Q4_1) float16 numbers in front."""
    if kind == "F32":
        return data.float()
    size = {"Q8_0": 34, "Q4_1": 20}[kind]
    blocks = data.reshape(data.shape[0], -1, size)
    head = 2 if kind == "Q8_0" else 4
    scale, body = blocks[..., :head].contiguous().view(torch.float16).float(), blocks[..., head:].contiguous()
    if kind == "Q8_0":
        return (scale * body.view(torch.int8).float()).reshape(data.shape[0], -1)
    values = torch.cat([body & 15, body >> 4], -1).float()
    return (scale[..., :1] * values + scale[..., 1:]).reshape(data.shape[0], -1)


def load(path, device, heads=9, kv_heads=3):
    """Stacked float32 weights of the packed model; llama.cpp's row order of q and k is undone."""
    packed = torch.load(path)
    layers = 1 + max(int(name.split(".")[1]) for name in packed if name.startswith("blk"))

    def get(name):
        return dequantized(packed[name][0], packed[name][1].to(device))

    def unpermuted(w, n):
        return w.reshape(n, w.shape[0] // n // 2, 2, -1).swapaxes(2, 1).reshape(w.shape)

    weights = {"emb": get("token_embd.weight"), "final": get("output_norm.weight")}
    for key, name in {"n1": "attn_norm", "n2": "ffn_norm"}.items():
        weights[key] = torch.stack([get(f"blk.{i}.{name}.weight") for i in range(layers)])
    names = {
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "o": "attn_output",
        "g": "ffn_gate",
        "u": "ffn_up",
        "d": "ffn_down",
    }
    for key, name in names.items():
        matrices = [get(f"blk.{i}.{name}.weight") for i in range(layers)]
        if key in "qk":
            matrices = [unpermuted(w, heads if key == "q" else kv_heads) for w in matrices]
        weights[key] = torch.stack(matrices)
    return weights


def phi(u):
    y = torch.cat([u.relu(), (-u).relu()], -1)
    return F.normalize(torch.cat([y * y.roll(shift, -1) for shift in (1, 2, 3)], -1), dim=-1, eps=1e-12)


def llama_layer(x, n1, qkv, out, n2, gate_up, down, cos, sin, heads: int, kv_heads: int, eps: float):
    B, P, D = x.shape
    size = D // heads
    a = F.linear(F.rms_norm(x, (D,), n1, eps), qkv).view(B, P, heads + 2 * kv_heads, size)
    r, v = a.split([heads + kv_heads, kv_heads], 2)
    r1, r2 = r.chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    q, k = torch.cat([r1 * c - r2 * s, r2 * c + r1 * s], -1).transpose(1, 2).split([heads, kv_heads], 1)
    k, v = (
        t[:, :, None].expand(-1, -1, heads // kv_heads, -1, -1).reshape(B, heads, P, size)
        for t in (k, v.transpose(1, 2))
    )
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, P, D)
    x = x + F.linear(o, out)
    gate, up = F.linear(F.rms_norm(x, (D,), n2, eps), gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


def read(x, y, K, U, z, wq):
    """x plus what the memory answers to y, the projections' input."""
    q = phi(F.linear(y, wq))
    return x + (((q @ K.mT) / ((q @ z[..., None]) + 1e-5)) @ U).to(x.dtype)


def write(y, wk, wv, wb, bias, state):
    """The list of associations after the memory tokens' y, and z."""
    k, v, beta = phi(F.linear(y, wk)), F.linear(y, wv), torch.sigmoid(F.linear(y, wb, bias))
    if state is None:
        return k, beta * v, k.sum(-2)
    K, U, z = state
    kz = (k @ z[..., None]) + 1e-5
    known = (k @ K.mT) @ U / kz
    with torch.no_grad():
        gamma = (1 - kz[..., 0] / k.square().sum(-1)).clamp(0, 1)
        frozen = (gamma == 0)[..., None]
        H = (k * frozen) @ (beta / kz * k * frozen).mT
        h = H @ H.sum(-1, keepdim=True)
        scale = (1.9 / ((H @ h) / h.clamp(min=1e-30)).amax((-2, -1))).clamp(max=1)[:, None, None]
    beta = torch.where(frozen, beta * scale, beta)
    return torch.cat([K, k], 1), torch.cat([U, beta * (v - known)], 1), z + (gamma[..., None] * k).sum(-2)


class Statistics(nn.Module):
    """
    Running mean and deviation of the RMS-normalised inputs of some layers' projections; with `slots` memory tokens
    each has a mean of its own, so that what is left is what a token says about its segment and not which token it is.
    """

    def __init__(self, layers, size, dtype, device, slots=1):
        super().__init__()
        self.mean = torch.zeros(layers, slots, size, dtype=dtype, device=device)
        self.var = torch.ones(layers, size, dtype=dtype, device=device)
        self.seen = [0] * layers

    @torch.no_grad()
    def update(self, i, y):
        self.seen[i] += 1
        weight = max(1 / self.seen[i], 0.02)
        mean = y.mean(0) if self.mean.shape[1] > 1 else y.mean((0, 1))[None]
        self.mean[i].lerp_(mean, weight)
        self.var[i].lerp_((y - self.mean[i]).square().mean((0, 1)), weight)

    def forward(self, i, y):
        return (y - self.mean[i]) * torch.rsqrt(self.var[i] + 1e-4)


class Network(nn.Module):
    """
    Llama with memory in the layers `C["layers"]`. `C`: configuration of search.py. `forward` returns the normalised
    last hidden states `(B, seg, D)` of the last segment.
    """

    def __init__(self, weights, C, device, dtype=torch.bfloat16, heads=9, kv_heads=3, theta=1e5, eps=1e-5):
        super().__init__()
        self.C, self.dtype, self.heads, self.kv_heads, self.eps = C, dtype, heads, kv_heads, eps
        self.L, self.D = weights["n1"].shape
        D = self.D
        self.full = torch.promote_types(dtype, torch.float32)  # dtype of the memory
        self.base = {k: weights[k].to(dtype) for k in TARGETS}
        self.emb = weights["emb"].to(dtype)
        self.n1, self.n2, self.final = (weights[k].to(dtype) for k in ("n1", "n2", "final"))

        def parameter(t):
            return nn.Parameter(t.to(device=device, dtype=self.full))

        self.lora, self.master = nn.ParameterDict(), nn.ParameterDict()
        for k in TARGETS:
            out, size = weights[k].shape[1:]
            if C["full"]:
                self.master[k] = parameter(weights[k].clone())
            else:
                self.lora["A" + k] = parameter((torch.rand(self.L, C["r"], size) * 2 - 1) * size**-0.5)
                self.lora["B" + k] = parameter(torch.zeros(self.L, out, C["r"]))
        self.layers = list(range(self.L)) if C["layers"] is None else list(C["layers"])
        self.at = {layer: i for i, layer in enumerate(self.layers)}
        M, d = len(self.layers), C["d"]

        def uniform(*shape):
            return parameter((torch.rand(*shape) * 2 - 1) * D**-0.5)

        self.mem = nn.ParameterDict(
            {"q": uniform(M, d, D), "k": uniform(M, d, D), "v": parameter(torch.zeros(M, D, D)), "b": uniform(M, 1, D)}
        )
        self.mem["bias"] = parameter(torch.ones(M, 1))
        if C["samekey"]:
            self.mem["k"].data.copy_(self.mem["q"].data)
        emb = weights["emb"].float()
        if C["start"] == "words":
            tokens = emb[500:16000][torch.randperm(min(15500, len(emb) - 500))[: C["m"]].to(emb.device)]
        else:
            tokens = torch.randn(C["m"], D) * emb[:1000].std().item()
        self.tokens = parameter(tokens)
        self.of_reads = Statistics(M, D, self.full, device)
        self.of_writes = Statistics(M, D, self.full, device, C["m"] if C["norm"] == "slot" else 1)
        position = torch.arange(256, device=device).float()
        angle = position[:, None] * theta ** (-torch.arange(0, D // heads, 2, device=device).float() / (D // heads))
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)
        self.tracking, self.probe, self.targets = False, None, None
        self.layer, self.read = llama_layer, read

    def compile(self, **options):
        torch._dynamo.config.recompile_limit = 64
        layer, reading = torch.compile(llama_layer, **options), torch.compile(read, **options)

        def dynamic(function, sizes):
            def call(*arguments):
                for t in arguments[:sizes]:
                    torch._dynamo.maybe_mark_dynamic(t, 0)
                    if t.dim() == 3:
                        torch._dynamo.maybe_mark_dynamic(t, 1)
                return function(*arguments)

            return call

        self.layer, self.read = dynamic(layer, 1), dynamic(reading, 4)

    def merged(self):
        """Per layer weights of qkv, output, gate and up, and down."""
        if self.C["full"]:
            W = {k: w.to(self.dtype) for k, w in self.master.items()}
        else:
            W = {
                k: torch.baddbmm(
                    self.base[k], self.lora["B" + k].to(self.dtype), self.lora["A" + k].to(self.dtype), alpha=2.0
                )
                for k in TARGETS
            }
        qkv, gate_up = torch.cat([W["q"], W["k"], W["v"]], 1), torch.cat([W["g"], W["u"]], 1)
        return qkv.unbind(0), W["o"].unbind(0), gate_up.unbind(0), W["d"].unbind(0)

    def projected(self, x, i, statistics):
        """The projections' input: as it is, RMS-normalised, or standardised after that."""
        x = x.to(self.full)
        if self.C["norm"] == "none":
            return x
        x = F.rms_norm(x, (self.D,), None, 1e-6)
        if self.C["norm"] == "rms":
            return x
        if self.tracking:
            statistics.update(i, x)
        return statistics(i, x)

    def positions(self, seg, last):
        """Rotary positions of a segment: memory tokens follow the text, or are spread over it."""
        p = torch.arange(seg, device=self.cos.device)
        if last:
            return p
        m = self.C["m"]
        j = torch.arange(m, device=p.device)
        return torch.cat([p, (j + 1) * seg // m if self.C["spread"] else seg + j])

    def forward(self, ids, seg):
        C, state = self.C, {}
        W = self.merged()
        mem = {k: v.unbind(0) for k, v in self.mem.items()}
        B, n, m = len(ids), ids.shape[1] // seg, C["m"]
        layer, reading = (self.layer, self.read) if torch.is_grad_enabled() else (llama_layer, read)
        tokens = self.tokens.to(self.dtype).expand(B, -1, -1)
        for j in range(n):
            last = j == n - 1
            x = F.embedding(ids[:, j * seg : (j + 1) * seg], self.emb)
            x = x if last else torch.cat([x, tokens], 1)
            p = self.positions(seg, last)
            cos, sin = self.cos[p], self.sin[p]
            for l in range(self.L):  # noqa: E741
                i = self.at.get(l)
                if i is not None and j:
                    y = self.projected(x, i, self.of_reads)
                    if self.probe is not None:
                        self.probe.setdefault(l, {})["S"] = (phi(F.linear(y, mem["q"][i])) @ state[l][0].mT).detach()
                    x = reading(x, y, *state[l], mem["q"][i])
                x = layer(
                    x, self.n1[l], W[0][l], W[1][l], self.n2[l], W[2][l], W[3][l], cos, sin,
                    self.heads, self.kv_heads, self.eps,
                )  # fmt: skip
                if last or (i is None and self.targets is None):
                    continue
                if i is not None:
                    y = self.projected(x[:, -m:], i, self.of_writes)
                    state[l] = write(y, mem["k"][i], mem["v"][i], mem["b"][i], mem["bias"][i], state.get(l))
                    if self.probe is not None and j == 0:
                        self.probe.setdefault(l, {})["k"] = state[l][0].detach()
                    if self.targets is not None:
                        self.targets["keys"].append(state[l][0][:, -m:])
                if self.targets is not None and (l in C["auxlayers"]):
                    self.targets["states"].append(x)
            if self.targets is not None and not last:
                self.targets["final"].append((ids[:, j * seg : (j + 1) * seg], x[:, -m:]))
        return F.rms_norm(x, (self.D,), self.final, self.eps)

    def parameter_groups(self, lr, memory_lr, decay):
        return [
            {"params": [*self.lora.values(), *self.master.values()], "lr": lr, "weight_decay": decay},
            {"params": [self.mem[k] for k in "qkvb"], "lr": memory_lr, "weight_decay": decay},
            {"params": [self.mem["bias"], self.tokens], "lr": memory_lr, "weight_decay": 0.0},
        ]
