"""Published weights into a GPT: GPT-2, Llama, Mistral, Qwen2, Qwen3, from the Hugging Face hub, a
folder with config.json and safetensors, or a GGUF file.

The model's class is handed in. Weights never run code: foreign pickles (.bin, .pt) are refused. The
model is made empty and filled one tensor at a time from a memory map, so that there is one copy of
the weights and one tensor.
"""

import torch

from leangpt.system.errors import UserError
from leangpt.weights.empty_model import allocate, shapes_of
from leangpt.weights.find import find_pretrained, open_weights
from leangpt.weights.shape import shaped


def load_pretrained(GPT, name_or_dir, device="cpu", dtype=torch.float32, **overrides):
    """A GPT with published weights, in evaluation mode, on `device` with parameters in `dtype`.

    name_or_dir: gpt2 | gpt2-medium | gpt2-large | gpt2-xl, another hub id, a folder with
    config.json and model.safetensors (or its shards and index), or a GGUF file or its folder.
    overrides: what config_class.FREE names (dropout, attention_policy, q_chunk, ...) and
    block_size; with learned positions that can only shrink.
    Raises UserError where the weights cannot be had, are damaged, do not fit (the tensor and
    both shapes are named), or belong to an architecture that GPT cannot express.
    """
    weights = open_weights(find_pretrained(name_or_dir))
    config, block_size = shaped(GPT.config_class, weights.settings, weights.path, overrides)
    model = shapes_of(GPT, config, len(weights.names()), weights.path)
    places = _places(model, weights)
    model = allocate(model, device, dtype)
    _fill(model, weights, places)
    if block_size < config.block_size:
        model.crop_block_size(block_size)
    return model.eval()


def _places(model, weights):
    """The pieces that fill the model; UserError for missing, left over or misshapen tensors.

    Before a byte is allocated: a damaged config.json may ask for any size.
    """
    pieces, found = weights.pieces(model.config), weights.names()
    wanted = {piece.theirs for piece in pieces}
    if model.config.tie_embeddings and "lm_head.weight" in found:
        _check_tied(weights, pieces[0].theirs)
        found = found - {"lm_head.weight"}
    _name_some(sorted(wanted - found), f"{weights.path}: tensor %s is missing")
    _name_some(sorted(found - wanted), f"{weights.path}: tensor %s is not part of such a model")
    parameters = dict(model.named_parameters())
    for piece in pieces:
        shape, needed = weights.shape(piece.theirs), _place(parameters, piece).shape
        if shape != needed:
            raise UserError(
                f"{weights.path}: tensor {piece.theirs} has shape {list(shape)}, the "
                f"model needs {list(needed)}"
            )
    return pieces


def _place(parameters, piece):
    """The part of our parameters, in their orientation, that a piece fills."""
    place = parameters[piece.ours]
    if piece.rows is not None:
        place = place[piece.rows[0] : piece.rows[1]]
    return place.t() if piece.transposed else place


@torch.no_grad()
def _fill(model, weights, pieces):
    """Copy every tensor to its place, one at a time."""
    parameters, filled = dict(model.named_parameters()), 0
    if hasattr(weights, "in_file_order"):
        pieces = weights.in_file_order(pieces)
    for piece in pieces:
        tensor = weights.read(piece.theirs)
        if piece.paired_heads:
            tensor = halves_apart(tensor, piece.paired_heads)
        place = _place(parameters, piece)
        place.copy_(tensor)
        del tensor  # or it would keep its shard mapped
        filled += place.numel()
    assert filled == sum(parameter.numel() for parameter in parameters.values())


def halves_apart(weight, n_head):
    """Rows (n_head D, ...) with rotary pairs (2i, 2i+1) reordered to pairs (i, i + D/2)."""
    rows, *rest = weight.shape
    return weight.view(n_head, rows // n_head // 2, 2, *rest).transpose(1, 2).reshape(rows, *rest)


def _check_tied(weights, embedding):
    if not torch.equal(weights.read("lm_head.weight"), weights.read(embedding)):
        raise UserError(
            f"{weights.path}: the config ties lm_head.weight to {embedding}, but the "
            "file holds different numbers for them; set tie_word_embeddings to false"
        )


def _name_some(names, message):
    if names:
        others = f" ({len(names) - 1} more like it)" if len(names) > 1 else ""
        raise UserError(message % names[0] + others)
