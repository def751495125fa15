"""
One worker of the search: python search.py WEIGHTS.pt DATA.pt OUT DEADLINE RUNS.json takes the next configuration of
the list until the time (seconds since 1970) is up, and writes one file of JSON lines for each. launch.py starts
several. What was tried, with the configurations, is in search.json.

The task: bAbI stories in segments of 24 tokens, asked in a segment of their own about one of the persons, or about
all of them at once ("multi": an answer after each name). A level (told, filler) has up to that many segments; it ends
when .96 of 512 questions on validation stories are answered exactly. A reader that knows the places of the text but
not who is where answers .56, with a loss of .435 on single questions and .296 on "multi".
"""

import json
import os
import random
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from network import Network, load


torch.backends.cuda.matmul.allow_tf32 = True
BASE = {
    "name": "x", "seed": 0, "layers": list(range(10, 29, 2)), "m": 8, "d": 64, "r": 16, "full": 0,
    # inputs of the memory's projections: none, rms, std (standardised by running statistics), slot (a mean for each
    # memory token); one start for keys and queries; words: memory tokens start as embeddings; spread: positions
    "norm": "rms", "samekey": 0, "start": "normal", "spread": 0, "track": 10**9,
    # a target for memory tokens: state, tokens, lens, keys; its weight, and that after the break
    "aux": "", "auxweight": 0.5, "auxlayers": list(range(10, 29, 2)), "auxlater": 1.0,
    "lr": 1e-3, "mlr": 1e-3, "warm": 30, "clip": 1.0, "wd": 0.01, "tokens": 12288, "later": 12288, "seg": 24,
    "multi": 0.5, "two": 0, "fullshare": 0.0, "levels": [(1, 0), (2, 0), (3, 1), (4, 4)], "goal": 0.96,
    "every": 6400, "maxwall": 90000, "maxall": 400000, "post": 60, "keep": 0, "compile": 1, "asked": 512,
}  # fmt: skip


class Data:
    def __init__(self, D, seg):
        self.D, self.F, self.seg = D, D["filler"], seg

    def filler(self, n, g):
        i = g.randrange(len(self.F) - n - 1)
        return self.F[i : i + n]

    def window(self, side, told, g, most, two):
        """At most `most` facts that fit whole into `told` segments: tokens, and where each person is."""
        T = self.D[side]
        story = T[g.randrange(len(T))]
        start = g.randrange(len(story))
        chosen, size, people = [], 0, set()
        for fact in (story + T[g.randrange(len(T))])[start:]:
            if two and fact[1] in people:
                continue
            if size + len(fact[0]) > told * self.seg or len(chosen) == (2 if two else most):
                break
            chosen.append(fact)
            people.add(fact[1])
            size += len(fact[0])
        where = {}
        for _, who, place in chosen:
            where.pop(who, None)
            where[who] = place
        return [t for fact in chosen for t in fact[0]], where

    def batch(self, side, rows, level, multi, g, full=False):
        """Token rows, (row, position) of each answer's predecessor, answers, and (persons, facts back) of each."""
        two = level[0] == "two"
        told, filler = (1, 0) if two else level
        X, positions, answers, about, seg = [], [], [], [], self.seg
        for b in range(rows):
            body, where = self.window(side, told, g, 99 if full else 1 + g.randrange(3 * told + 1), two)
            who = list(where)
            if multi:
                tail, at = [], []
                for w in g.sample(who, len(who)):
                    tail += self.D["name"][w]
                    at.append(len(tail) - 1)
                    tail.append(where[w])
                    answers.append(where[w])
                positions += [(b, seg - len(tail) + p) for p in at]
            else:
                w = who[g.randrange(len(who))]
                tail = self.D["ask"][w] + [where[w]]
                positions.append((b, seg - 2))
                answers.append(where[w])
                about.append((len(who), who[::-1].index(w)))
            X.append(
                self.filler(told * seg - len(body), g) + body + self.filler((filler + 1) * seg - len(tail), g) + tail
            )
        return X, positions, answers, about


def standardised(x, text):
    mean, std = text.flatten(0, 1).mean(0), text.flatten(0, 1).std(0)
    return (x - mean) / (std + 1e-4)


def state_loss(x, seg, m):
    """1 - cosine of memory token j's state and the mean state of the j-th share of its segment, standardised."""
    x = F.rms_norm(x.float(), (x.shape[-1],))
    text = x[:, 1:seg].detach()  # the first token is an attention sink
    target = standardised(text, text)
    if m >= seg - 1:
        target = target[:, (torch.arange(m, device=x.device) * seg // m - 1).clamp(min=0)]
    else:
        edges = [max(0, j * seg // m - 1) for j in range(m + 1)]
        target = torch.stack([target[:, a:b].mean(1) for a, b in zip(edges[:-1], edges[1:], strict=False)], 1)
    return 1 - F.cosine_similarity(standardised(x[:, seg:], text), target, dim=-1).mean()


def token_loss(ids, x, net):
    """Cross entropy of memory token j's prediction of the tokens in the j-th share of its segment."""
    m, seg = x.shape[1], ids.shape[1]
    logits = (F.rms_norm(x, (net.D,), net.final, net.eps) @ net.emb.T).float().log_softmax(-1)
    owner = torch.arange(seg, device=ids.device) * m // seg if m <= seg else torch.arange(seg, device=ids.device)
    return -logits[:, owner].gather(-1, ids[..., None]).mean()


def key_loss(k):
    m = k.shape[1]
    return ((k @ k.mT).sum((-2, -1)) - k.square().sum((-2, -1))).mean() / (m * (m - 1))


def auxiliary(net, seg):
    C, T = net.C, net.targets
    if C["aux"] == "state":
        return torch.stack([state_loss(x, seg, C["m"]) for x in T["states"]]).mean()
    if C["aux"] == "tokens":
        return torch.stack([token_loss(ids, x, net) for ids, x in T["final"]]).mean()
    if C["aux"] == "lens":  # the same at middle layers
        ids = T["final"][0][0]
        return torch.stack([token_loss(ids, x[:, seg:], net) for x in T["states"][: len(C["auxlayers"])]]).mean()
    return torch.stack([key_loss(k) for k in T["keys"]]).mean()


def run(C, weights, D, path, deadline, device):
    C = {**BASE, **C}
    torch.manual_seed(C["seed"])
    log = open(path, "a")  # noqa: SIM115

    def say(**record):
        log.write(json.dumps(record) + "\n")
        log.flush()

    data, seg = Data(D, C["seg"]), C["seg"]
    net = Network(weights, C, device, torch.bfloat16 if device == "cuda" else torch.float32)
    groups = net.parameter_groups(C["lr"], C["mlr"], C["wd"])
    optimizer = torch.optim.AdamW(groups, fused=device == "cuda")
    rates, parameters = [g["lr"] for g in optimizer.param_groups], [p for g in groups for p in g["params"]]
    say(config=C, trained=sum(p.numel() for p in parameters))
    if C["compile"] and os.path.exists("/tmp/compile_ok"):
        net.compile()

    def tensor(values):
        t = torch.tensor(values)
        return t.pin_memory().to(device, non_blocking=True) if device == "cuda" else t

    @torch.no_grad()
    def score(level, n=C["asked"], chunk=512):
        g, hits, about = random.Random(5), [], []
        for _ in range(max(1, n // chunk)):
            X, _, _, info = data.batch("test", min(n, chunk), level, False, g, True)
            x = tensor(X)
            hits.append(((net(x, seg)[:, -2] @ net.emb.T).argmax(-1) == x[:, -1]).cpu())
            about += info
        hits, about = torch.cat(hits).float(), torch.tensor(about)
        by = {}
        for people in (2, 3, 4):
            for back in range(people):
                rows = (about[:, 0] == people) & (about[:, 1] == back)
                if rows.sum() > 5:
                    by[f"{people}p{back}b"] = round(hits[rows].mean().item(), 2)
        return round(hits.mean().item(), 3), by

    @torch.no_grad()
    def probe():
        """
        By layer: mean cosine of two keys of a segment, how many slots a name's read falls on (exp of the entropy), and
        the total variation between the reads of two names.
        """
        X, positions, _, _ = data.batch("test", C["asked"] // 4, (1, 0), True, random.Random(6), True)
        net.probe = {}
        net(tensor(X), seg)
        stats, net.probe, rows, result = net.probe, None, {}, {}
        for b, p in positions:
            rows.setdefault(b, []).append(p)
        b, p, q = (
            tensor(list(c)) for c in zip(*[(b, p[0], p[1]) for b, p in rows.items() if len(p) > 1], strict=False)
        )
        for l in net.layers:  # noqa: E741
            w = stats[l]["S"] / stats[l]["S"].sum(-1, keepdim=True).clamp(min=1e-9)
            u, v = w[b, p], w[b, q]
            slots = torch.exp(-(u * u.clamp(min=1e-9).log()).sum(-1)).mean()
            numbers = key_loss(stats[l]["k"]), slots, 0.5 * (u - v).abs().sum(-1).mean()
            result[l] = [round(x.item(), 3) for x in numbers]
        return result

    order = random.Random(C["seed"])
    levels = [("two", 0)] * bool(C["two"]) + list(C["levels"])
    level = step = samples = 0
    losses, due, wall, walled, end = [], C["every"], None, 0, "time"
    start = time.time()
    while time.time() < deadline:
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate * min(1, (step + 1) / C["warm"])
        multi, now = order.random() < C["multi"], levels[level]
        if now[0] != "two":
            now = 1 + order.randrange(now[0]), order.randrange(now[1] + 1)
        full = wall is not None and order.random() < C["fullshare"]
        if full:  # as many facts as the level's validation has
            now = levels[level][0], now[1]
        total = 2 if now[0] == "two" else sum(now) + 1
        rows = max(8, C["tokens" if wall is None else "later"] // (seg * total))
        X, positions, answers, _ = data.batch("train", rows, now, multi, order, full)
        net.tracking = step < C["track"] and (step < 20 or step % 4 == 0)
        weight = C["auxweight"] * (1.0 if wall is None else C["auxlater"])
        net.targets = {"states": [], "final": [], "keys": []} if C["aux"] and weight else None
        hidden, at = net(tensor(X), seg), tensor(positions)
        net.tracking = False
        loss = F.cross_entropy((hidden[at[:, 0], at[:, 1]] @ net.emb.T).float(), tensor(answers))
        extra = auxiliary(net, seg) if net.targets else None
        net.targets = None
        (loss if extra is None else loss + weight * extra).backward()
        torch.nn.utils.clip_grad_norm_(parameters, C["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(("multi" if multi else "single", loss.detach()))
        if extra is not None:
            losses.append(("aux", extra.detach()))
        step += 1
        samples += rows
        if step == 3:
            say(step=step, s=round(time.time() - start, 1), loss=loss.item())
        if samples < due:
            continue
        due += C["every"]
        now = levels[level]
        accuracy, by = score(now)
        means = {k: torch.stack([v for n, v in losses if n == k]) for k in dict(losses)}
        means = {k: round(v.mean().item(), 3) for k, v in means.items()}
        losses = []
        seconds = round(time.time() - start, 1)
        say(step=step, s=seconds, samples=samples, level=now, score=accuracy, by=by, loss=means, probe=probe())
        if accuracy >= C["goal"]:
            if wall is None and now[0] == 1:
                wall, walled = samples, time.time()
            if level + 1 == len(levels):
                end = "all levels"
                break
            level += 1
            say(samples=samples, s=seconds, up=levels[level])
        near = means.get("multi", 1) < 0.25 and samples < 1.6 * C["maxwall"]  # well below the bag's loss
        if wall is None and samples > C["maxwall"] and not near:
            end = "no break"
        elif (wall is not None and time.time() - walled > C["post"]) or samples > C["maxall"]:
            end = "enough"
        if end != "time":
            break
    far = {}
    for level in [(1, 0), (3, 0), (3, 8), (3, 30), (3, 126), (8, 8)] if wall else []:
        if time.time() < deadline + 8:
            far[f"{level[0]}+{level[1]}"] = score(level, chunk=256)[0]
    memory = round(torch.cuda.max_memory_allocated() / 2**30, 1) if device == "cuda" else 0
    seconds = round(time.time() - start, 1)
    say(done=end, wall=wall, samples=samples, step=step, s=seconds, far=far, gib=memory)
    if C["keep"] and wall:
        state = {k: v.detach().to(torch.bfloat16).cpu() for k, v in net.named_parameters()}
        for kind in ("mean", "var"):
            for name in ("of_reads", "of_writes"):
                state[f"{name}.{kind}"] = getattr(getattr(net, name), kind).cpu()
        names = sorted(state)
        lora = [n for n in names if n.startswith(("lora", "master"))]
        torch.save({"config": C, "state": {n: state[n] for n in lora}}, path.replace(".jsonl", ".lora.pt"))
        torch.save(
            {"config": C, "state": {n: state[n] for n in names if n not in lora}}, path.replace(".jsonl", ".memory.pt")
        )


def main():
    weights_path, data_path, out, deadline, configs = sys.argv[1:6]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights, D = None, torch.load(data_path)
    for C in json.loads(Path(configs).read_text()):
        if time.time() > float(deadline) - 30:
            break
        try:  # the first to make the file runs it
            os.close(os.open(f"{out}/{C['name']}.jsonl", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        weights = load(weights_path, device) if weights is None else weights
        try:
            run(C, weights, D, f"{out}/{C['name']}.jsonl", float(deadline), device)
        except Exception:
            with open(f"{out}/{C['name']}.jsonl", "a") as log:
                log.write(json.dumps({"error": traceback.format_exc()[-1500:]}) + "\n")


if __name__ == "__main__":
    main()
