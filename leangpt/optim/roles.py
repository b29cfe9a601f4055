"""Who is who among a model's parameters."""

from torch import nn

LINEAR_ROLES = ("qkv", "attn_out", "mlp_in", "mlp_out", "linear")
ROLE_OF_NAME = {  # how the names of nn.Linear modules end
    "c_attn": "qkv",
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "attn.c_proj": "attn_out",
    "o_proj": "attn_out",
    "mlp.c_fc": "mlp_in",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
    "mlp.c_proj": "mlp_out",
    "down_proj": "mlp_out",
}


def parameters_by_role(model):
    """[(role, [parameters], layout)] over every trainable parameter of `model`, each just once.

    layout: {"row_blocks": ...} of an attention input projection, from its nn.Linear; empty
    otherwise.
    """
    lookups = (nn.Embedding, nn.EmbeddingBag)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, lookups)}
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != "lm_head":
            if id(module.weight) not in tables:
                linears[id(module.weight)] = (name, module)
    found = {}
    for p in model.parameters():
        if not p.requires_grad:
            continue
        role, layout = "embedding", {}
        if p.ndim < 2:
            role = "vector"
        elif id(p) in linears:
            name, module = linears[id(p)]
            role = linear_role(name, module)
            if getattr(module, "row_blocks", None) is not None:
                layout = {"row_blocks": tuple(module.row_blocks)}
        key = (role, *layout.values())
        found.setdefault(key, (role, [], layout))[1].append(p)
    return list(found.values())


def linear_role(name, module):
    """qkv, attn_out, mlp_in, mlp_out by nanoGPT's or Llama's names; else "linear"."""
    if hasattr(module, "row_blocks"):
        return "qkv"
    return next((role for end, role in ROLE_OF_NAME.items() if name.endswith(end)), "linear")
