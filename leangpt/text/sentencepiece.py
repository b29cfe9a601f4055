"""SentencePiece vocabularies: read out of a tokenizer.model, made into a tokenizer.json.

A tokenizer.model is a protocol buffer (sentencepiece_model.proto). Of it we read the pieces with
their scores and types and the few settings that change what is encoded. GGUF files hold the same
pieces, scores and types in their metadata.
"""

import re
import struct
from dataclasses import dataclass

from leangpt.system.errors import UserError

SPACE = "\u2581"  # what SentencePiece writes for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces
UNIGRAM, BPE = 1, 2  # model types; word and char models are refused


@dataclass
class Pieces:
    """A SentencePiece vocabulary and how it is used."""

    texts: list[str]  # by id
    scores: list[float]
    types: list[int]
    model_type: int = BPE
    byte_fallback: bool = False  # unknown characters become their bytes' pieces
    dummy_prefix: bool = True  # a space is put in front of a text
    extra_whitespace: bool = True  # kept; False: runs of spaces become one, and none at the ends
    charsmap: bytes = b""  # normalisation of characters, as SentencePiece compiles it


def read_model(content: bytes, where) -> Pieces:
    """Pieces of a tokenizer.model's bytes. Raises UserError, beginning with `where`, where it is
    none, or of another kind than BPE and unigram."""
    try:
        texts, scores, types, trainer, normalizer = [], [], [], {}, {}
        for number, value in fields(content):
            if number == 1:
                piece = dict(fields(value))
                texts.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
                types.append(piece.get(3, NORMAL))
            elif number == 2:
                trainer = dict(fields(value))
            elif number == 3:
                normalizer = dict(fields(value))
        found = Pieces(
            texts,
            scores,
            types,
            trainer.get(3, UNIGRAM),
            bool(trainer.get(35, 0)),
            bool(normalizer.get(3, 1)),
            not normalizer.get(4, 1),
            normalizer.get(2, b""),
        )
        if not isinstance(found.charsmap, bytes) or not all(type(t) is int for t in types):
            raise ValueError("a field of another type")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, IndexError) as error:
        raise UserError(f"{where} is not a SentencePiece model ({error})") from None
    if not texts:
        raise UserError(f"{where} is not a SentencePiece model (it has no pieces)")
    if found.model_type not in (UNIGRAM, BPE):
        raise UserError(
            f"{where}: SentencePiece model of type {found.model_type}; only BPE and unigram are "
            "read: put the model's tokenizer.json beside it"
        )
    return found


def fields(data: bytes):
    """(number, value) of a protocol buffer's fields: int for varints, bytes for everything else.

    Raises ValueError or IndexError where the bytes are none.
    """
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def take(count):
        nonlocal at
        if count > len(data) - at:
            raise ValueError("it ends too soon")
        at += count
        return data[at - count : at]

    while at < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
        elif kind in (1, 5):
            yield number, take(8 if kind == 1 else 4)
        elif kind == 2:
            yield number, take(varint())
        else:
            raise ValueError(f"a field of kind {kind}")


def tokenizer_json(pieces: Pieces, legacy: bool = True) -> str:
    """A tokenizer.json that encodes as the pieces' SentencePiece model does.

    legacy: every stretch between special tokens gets a space in front, as each is a text of its
    own to SentencePiece; False, as newer versions of `transformers` have it: a text's first alone,
    unless it begins with one. Raises UserError where the pieces do not make a tokenizer.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    kinds = list(zip(pieces.texts, pieces.types))
    own = [text for text, kind in kinds if kind == USER_DEFINED]
    unknown = next((i for i, kind in enumerate(pieces.types) if kind == UNKNOWN), None)
    try:
        if pieces.model_type == BPE:
            model = models.BPE(
                vocab={text: i for i, text in enumerate(pieces.texts)},
                merges=merges_of(pieces),
                unk_token=None if unknown is None else pieces.texts[unknown],
                fuse_unk=True,
                byte_fallback=pieces.byte_fallback,
                ignore_merges=bool(own),  # those that come whole are pieces without merges
            )
        else:
            model = models.Unigram(
                list(zip(pieces.texts, pieces.scores)), unknown, pieces.byte_fallback
            )
        tokenizer = Tokenizer(model)
        steps = [normalizers.Precompiled(pieces.charsmap)] if pieces.charsmap else []
    except Exception as error:  # the package raises a bare Exception
        raise UserError(f"the SentencePiece vocabulary makes no tokenizer ({error})") from None
    if not pieces.extra_whitespace:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    cuts = []
    if pieces.dummy_prefix and legacy:
        steps.append(normalizers.Prepend(SPACE))
    elif pieces.dummy_prefix:
        cuts.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if own:
        longest_first = sorted(own, key=len, reverse=True)
        pattern = Regex("|".join(re.escape(text) for text in longest_first))
        cuts.append(pre_tokenizers.Split(pattern, behavior="isolated"))
    if cuts:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if pieces.dummy_prefix:
        parts.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(parts)
    control = [text for text, kind in kinds if kind in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    return tokenizer.to_str()


def merges_of(pieces: Pieces) -> list[tuple[str, str]]:
    """What SentencePiece's BPE merges, first the best: any two pieces that together are a third,
    by the score of that one (it has no list of merges)."""
    normal = {
        text: (-score, i)
        for i, (text, score, kind) in enumerate(zip(pieces.texts, pieces.scores, pieces.types))
        if kind == NORMAL
    }
    found = [
        (*rank, text[:cut], text[cut:])
        for text, rank in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    return [(left, right) for *_, left, right in sorted(found)]
