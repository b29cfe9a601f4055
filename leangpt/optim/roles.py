"""Who is who among a model's parameters: all that build_optimizer knows of a model.

    role       what it is                                     by what it is known
    qkv        a projection into queries, keys, values        its name, or that it has row_blocks
    attn_out   the projection out of attention                its name
    mlp_in     a projection into an MLP, gates too            its name
    mlp_out    the projection out of an MLP                   its name
    conv       a convolution, as a matrix out x (in * kernel) its class
    lora       a factor of a low-rank adapter                 lora_A, lora_B in its name
    linear     any other linear layer                         its class
    embedding  a table, an output head, and every matrix that no rule places
    vector     what has one dimension, or one alone that is not 1: gains, biases

Names are those of nanoGPT, Hugging Face's models and torch.nn.Transformer. A name that is not known
costs nothing but the rate by role that some variants have: a linear layer is one by its class.

Orthogonalising (MuonSN) and a second moment per row (AdamSN) need to know which way round a matrix
lies and whether it is one: a Placement says so. A model of one's own that stacks projections says
it by an attribute of the layer, or of the module that holds it, as the attention of model.py does:

    row_blocks = (rows of q, rows of k, rows of v)        in the order of the layer's outputs

and its MLP by one of the layer, for gate and up.
"""

from dataclasses import dataclass

import torch
from torch import nn

LINEAR_ROLES = ("qkv", "attn_out", "mlp_in", "mlp_out", "conv", "lora", "linear")
ENDINGS = {  # the ends of layers' names; the longest that fits counts
    "qkv": """c_attn q_attn c_q c_k c_v q_proj k_proj v_proj qkv_proj qkv Wqkv
        query_key_value query key value q_lin k_lin v_lin q_a_proj q_b_proj kv_a_proj_with_mqa
        kv_b_proj SelfAttention.q SelfAttention.k SelfAttention.v EncDecAttention.q
        EncDecAttention.k EncDecAttention.v attention.wq attention.wk attention.wv""",
    "attn_out": """attn.c_proj crossattention.c_proj o_proj attn.out_proj attention.out_proj
        attn.proj attention.output.dense attention.dense self_attention.dense attention.out_lin
        SelfAttention.o EncDecAttention.o attention.wo attn.Wo""",
    "mlp_in": """mlp.c_fc gate_proj up_proj gate_up_proj fc1 linear1 intermediate.dense
        dense_h_to_4h DenseReluDense.wi DenseReluDense.wi_0 DenseReluDense.wi_1 ffn.lin1
        feed_forward.w1 feed_forward.w3 mlp.Wi""",
    "mlp_out": """mlp.c_proj down_proj fc2 linear2 output.dense dense_4h_to_h DenseReluDense.wo
        ffn.lin2 feed_forward.w2 mlp.Wo""",
}
ROLE_OF_NAME = {end: role for role, ends in ENDINGS.items() for end in ends.split()}
# Names that are an MLP's only where the two layers fit each other the other way round as well.
PAIRS = {"fc1": "fc2", "fc2": "fc1", "linear1": "linear2", "linear2": "linear1"}
HEADS = ("lm_head", "embed_out", "output_projection", "classifier", "score", "head")
WRAPPERS = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
LORA = ("lora_A", "lora_B")
# Projections that are known to stack q, k and v one after the other, and how many matrices of as
# many rows as columns. (Bloom's and NeoX's query_key_value has them head by head: one matrix.)
STACKED = {"c_attn": (2, 3), "qkv": (3,), "Wqkv": (3,), "qkv_proj": (3,)}


@dataclass(frozen=True)
class Placement:
    """What one parameter is.

    row_blocks: rows of each of the matrices stacked in it, or None. transposed: it is stored
    (in, out), as Hugging Face's Conv1D has it; rows are outputs all the same. known: False where no
    rule places a matrix.
    """

    role: str
    row_blocks: tuple[int, ...] | None = None
    transposed: bool = False
    known: bool = True


def place_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter, Placement]]:
    """(name, parameter, Placement) of every trainable parameter of `model`, each just once.

    A parameter that several modules share is an embedding if it is one for any of them.
    """
    modules = dict(model.named_modules())
    heads = output_heads(model)
    placed = {}
    for prefix, module in modules.items():
        for leaf, p in module.named_parameters(prefix, recurse=False):
            if not p.requires_grad:
                continue
            if id(module) in heads:
                found = Placement("embedding" if p.ndim > 1 else "vector")
            else:
                found = place(p, leaf, module, modules)
            known = placed.setdefault(id(p), (leaf, p, found))
            if found.role == "embedding" and found.known and known[2] != found:
                placed[id(p)] = (known[0], p, found)
    return list(placed.values())


def place(p, name, module, modules) -> Placement:
    """The Placement of the parameter called `name`, which `module` holds."""
    prefix, _, leaf = name.rpartition(".")
    parts = [part for part in prefix.split(".") if part not in WRAPPERS]
    if p.ndim < 2:
        return Placement("vector")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or "lora_embedding" in name:
        return Placement("embedding")
    if leaf in LORA or any(part in LORA for part in parts):
        return Placement("lora", lora_blocks(p, name, modules))
    if isinstance(module, nn.MultiheadAttention):
        if leaf == "in_proj_weight":
            return Placement("qkv", (module.embed_dim,) * 3)
        if leaf in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            return Placement("qkv")
    if leaf == "weight":
        transposed = is_conv1d_of_transformers(module)
        if transposed or is_linear(module, p):
            owner, last = owner_of(prefix, modules), parts[-1] if parts else ""
            blocks = row_blocks_of(module, owner, last, p.mT if transposed else p)
            return Placement(role_of(parts, owner, blocks), blocks, transposed)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):  # a group is a matrix of its own
            groups, rows = module.groups, p.shape[0]
            return Placement("conv", (rows // groups,) * groups if groups > 1 else None)
    if p.numel() == max(p.shape):
        return Placement("vector")
    return Placement("embedding", known=False)


# ---------------------------------------------------------------------- layers


def is_linear(module, weight):
    """Is it torch's linear layer, or one like it: a weight (out_features, in_features)?"""
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return isinstance(module, nn.Linear) or tuple(weight.shape) == sizes


def is_conv1d_of_transformers(module):
    """Is it Hugging Face's linear layer of GPT-2, with a weight (in, out)? (No convolution.)"""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    )


def output_heads(model):
    """ids of the modules that turn hidden states into logits."""
    heads = {id(m) for name, m in model.named_modules() if name.rpartition(".")[2] in HEADS}
    for module in model.modules():
        if hasattr(module, "get_output_embeddings"):  # Hugging Face's models
            heads.add(id(module.get_output_embeddings()))
    return heads


def owner_of(prefix, modules):
    """The module that holds the layer called `prefix`, whatever is wrapped around the layer."""
    parts = prefix.split(".")
    while parts[-1] in WRAPPERS and len(parts) > 1:
        parts.pop()
    return modules.get(".".join(parts[:-1]))


def role_of(parts, owner, blocks):
    """The role of the linear layer of `owner` whose name is made of `parts`."""
    if isinstance(owner, nn.MultiheadAttention):
        return "attn_out"
    last = parts[-1] if parts else ""
    if last in PAIRS and not are_pair(owner, last, PAIRS[last]):
        return "linear"
    for count in (3, 2, 1):
        role = ROLE_OF_NAME.get(".".join(parts[-count:]))
        if role:
            return role
    return "qkv" if blocks else "linear"


def are_pair(owner, first, second):
    """Does the one layer take what the other gives, both ways?"""
    layers = [getattr(owner, name, None) for name in (first, second)]
    shapes = [tuple(layer.weight.shape) for layer in layers if hasattr(layer, "weight")]
    return len(shapes) == 2 and shapes[0] == shapes[1][::-1]


def row_blocks_of(module, owner, last, weight):
    """Rows of each matrix stacked in a linear weight (out, in): as declared, or known by the last
    part of its name."""
    rows, columns = weight.shape
    for declared in (getattr(module, "row_blocks", None), getattr(owner, "row_blocks", None)):
        if declared is not None and sum(declared) == rows:
            return tuple(declared)
    if last == "gate_up_proj" and rows % 2 == 0:
        return (rows // 2,) * 2
    if last not in STACKED:
        return None
    # Phi-3's attention: fewer heads for keys and values
    kv_heads = getattr(getattr(owner, "config", None), "num_key_value_heads", None)
    head_dim = getattr(owner, "head_dim", None)
    if kv_heads and head_dim and rows > 2 * kv_heads * head_dim:
        kv = kv_heads * head_dim
        return (rows - 2 * kv, kv, kv)
    if rows % columns == 0 and rows // columns in STACKED[last]:
        return (columns,) * (rows // columns)
    return None


def lora_blocks(p, name, modules):
    """An adapter's second factor has the rows of the layer that it adapts, and its blocks."""
    owner = name.partition(".lora_B")[0] if "lora_B" in name else ""
    base = modules.get(f"{owner}.base_layer", modules.get(owner)) if owner else None
    weight = getattr(base, "weight", None)
    if not torch.is_tensor(weight) or weight.ndim != 2:
        return None
    blocks = place(weight, f"{owner}.weight", base, modules).row_blocks
    return blocks if blocks and sum(blocks) == p.shape[0] else None
