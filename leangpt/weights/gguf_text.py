"""The text of a GGUF file: vocabulary, chat format and stop tokens as Hugging Face's files.

What the metadata says is the model's, whatever files lie beside; those give what it does not say,
and a vocabulary that cannot be rebuilt from it.
"""

import json

from leangpt.system.errors import UserError
from leangpt.text import sentencepiece
from leangpt.text.text_files import GENERATION, SETTINGS, TEMPLATE, TOKENIZER, parse
from leangpt.text.tokenizer_json import CUTS, byte_level_bpe, put_around

PREFIX = "tokenizer.ggml."
ENDS = ("eos", "eot", "eom")  # of text, of turn, of message: an id each, or several
NAMES = {  # in a tokenizer_config.json: in the metadata
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # so spelt
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}

STARTING = ("llama-bpe", "llama3", "llama-v3")  # byte-level vocabularies with a token in front


def gguf_text_files(metadata, where, beside=None):
    """({name: content}, notes) of a GGUF file's metadata.

    beside: text_files.read_text_files of its folder. Raises UserError where the vocabulary can
    be had from neither, and where the metadata are of other types than GGUF has for them.
    """
    try:
        return _files(metadata, where, beside)
    except (TypeError, AttributeError, LookupError) as error:
        raise UserError(f"{where}: its tokenizer's metadata are damaged ({error})") from None


def _files(metadata, where, beside):
    files, notes = dict(beside or {}), []
    own = {name.removeprefix(PREFIX): value for name, value in metadata.items()}
    tokens = own.get("tokens", [])
    settings = parse(files, SETTINGS, where)
    begins = own.get("add_bos_token")
    if TOKENIZER not in files:
        files[TOKENIZER] = tokenizer_json(own, where, notes)
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if begins is None:  # llama.cpp's own rule
            begins = own.get("model") == "llama" or own.get("pre") in STARTING
    for name, key in NAMES.items():
        number = own.get(key)
        if isinstance(number, int) and number < len(tokens):
            settings[name] = tokens[number]
    if begins is not None:
        first = settings.get("bos_token") if begins else None
        last = settings.get("eos_token") if own.get("add_eos_token") else None
        files[TOKENIZER] = put_around(files[TOKENIZER], first, last) + "\n"
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings.pop("chat_template", None)
        files[TEMPLATE] = template
    files[SETTINGS] = json.dumps(settings, indent=1) + "\n"
    ends = []
    for key in (f"{end}_token_id{several}" for end in ENDS for several in ("", "s")):
        ends += own[key] if isinstance(own.get(key), list) else [own[key]] if key in own else []
    if ends:
        ends = list(dict.fromkeys(ends))
        settled = parse(files, GENERATION, where) | {"eos_token_id": ends if ends[1:] else ends[0]}
        files[GENERATION] = json.dumps(settled) + "\n"
    return files, notes


def tokenizer_json(own, where, notes):
    """The tokenizer.json of a vocabulary: byte-level BPE with a known way of cutting words, or
    SentencePiece. own: the metadata without PREFIX. What is assumed is added to `notes`."""
    kind, cut = own.get("model"), own.get("pre")
    tokens, types = own.get("tokens", []), own.get("token_type", [])
    if not tokens:
        raise UserError(
            f"{where} has no tokenizer.ggml.tokens; put the model's tokenizer.json there"
        )
    if kind == "llama":  # SentencePiece's pieces, with the space in front of a text by default
        pieces = sentencepiece.Pieces(
            tokens,
            own.get("scores") or [-float(i) for i in range(len(tokens))],
            types or [sentencepiece.NORMAL] * len(tokens),
            byte_fallback=sentencepiece.BYTE in types,
            dummy_prefix=bool(own.get("add_space_prefix", True)),
        )
        return sentencepiece.tokenizer_json(pieces) + "\n"
    if kind == "gpt2" and cut is None:
        cut = "gpt-2"
        notes.append(
            f"{where} has no tokenizer.ggml.pre, which says how text is cut into words: GPT-2's "
            "way is taken, and tokens may differ from those the model was trained on"
        )
    if kind != "gpt2" or cut not in CUTS:
        raise UserError(
            f"{where}: its tokenizer ({kind!r}, {cut!r}) cannot be rebuilt; put the "
            "model's tokenizer.json into the same folder"
        )
    special = [t for t, kind in zip(tokens, types) if kind == sentencepiece.CONTROL]
    whole = [t for t, kind in zip(tokens, types) if kind == sentencepiece.USER_DEFINED]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in own.get("merges", [])]
    return byte_level_bpe(vocabulary, merges, cut, special, whole, where=where) + "\n"
