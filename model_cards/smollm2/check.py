"""network.py against modeling_armt on a tiny llama, with norms and spread memory tokens: logits and gradients."""

import torch
from network import Network
from transformers import AutoModelForCausalLM, LlamaConfig

from modeling_armt import ARMTForCausalLM


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=96, hidden_size=36, intermediate_size=64, num_hidden_layers=5, num_attention_heads=6, rms_norm_eps=1e-5,
    num_key_value_heads=2, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
)  # fmt: skip
layers, names = [1, 2, 4], {"q": "query", "k": "key", "v": "value", "b": "beta"}
backbone = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
options = {"segment_size": 7, "num_mem_tokens": 3, "d_mem": 8, "memory_layers": layers}
options |= {"memory_norm": True, "spread_memory_tokens": True}
model = ARMTForCausalLM.from_backbone(backbone, **options).double()
for memory in model.memory.values():
    torch.nn.init.normal_(memory.memory_value.weight, std=0.3)
state = {k: v.detach().clone() for k, v in backbone.state_dict().items()}


def stack(name):
    return torch.stack([state[f"model.layers.{i}.{name}.weight"] for i in range(5)])


weights = {"emb": state["model.embed_tokens.weight"], "final": state["model.norm.weight"]}
weights |= {"n1": stack("input_layernorm"), "n2": stack("post_attention_layernorm")}
weights |= {k: stack(f"self_attn.{k}_proj") for k in "qkvo"}
weights |= {k[0]: stack(f"mlp.{k}_proj") for k in ("gate", "up", "down")}
C = {"full": 1, "r": 4, "layers": layers, "d": 8, "m": 3, "norm": "slot", "samekey": 0, "start": "normal", "spread": 1}
network = Network(weights, C, "cpu", torch.float64, 6, 2)
for i, layer in enumerate(layers):
    for k, name in names.items():
        network.mem[k].data[i] = getattr(model.memory[str(layer)], f"memory_{name}").weight.detach()
    network.mem["bias"].data[i] = model.memory[str(layer)].memory_beta.bias.detach()
    for statistics, side in ((network.of_reads, "read"), (network.of_writes, "write")):
        norm = getattr(model.memory[str(layer)], f"memory_{side}_norm")
        statistics.mean[i].normal_()
        statistics.var[i].uniform_(0.2, 2)
        norm.weight.data.copy_(torch.rsqrt(statistics.var[i] + 1e-4))
        norm.bias.data.copy_(-statistics.mean[i] * norm.weight)
network.tokens.data.copy_(model.memory_tokens.weight.detach())
for segments in (1, 2, 3, 12):
    ids, w = torch.randint(96, (4, 7 * segments)), torch.randn(4, 7, 96, dtype=torch.float64)
    expected = model(ids, use_cache=False, schedule="sequential").logits[:, -7:]
    got = network(ids, 7) @ network.emb.T
    model.zero_grad()
    network.zero_grad()
    (expected * w).sum().backward()
    (got * w).sum().backward()
    errors = {"logits": (expected - got).abs().max().item()}
    o_proj = torch.stack([p.self_attn.o_proj.weight.grad for p in model.decoder.layers])
    pairs = {"o_proj": (o_proj, network.master["o"].grad)}
    if segments > 1:
        pairs |= {"tokens": (model.memory_tokens.weight.grad, network.tokens.grad)}
        for k, name in names.items():
            grads = [getattr(model.memory[str(layer)], f"memory_{name}").weight.grad for layer in layers]
            pairs[name] = torch.stack(grads), network.mem[k].grad
    errors |= {k: ((a - b).norm() / a.norm()).item() for k, (a, b) in pairs.items()}
    print(segments, {k: f"{v:.1e}" for k, v in errors.items()})
