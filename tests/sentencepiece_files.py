"""A tiny SentencePiece model, written byte by byte, and how SentencePiece encodes with it."""

from experiments.reliability.more_files import message

SPACE = "\u2581"
WORDS = "the cat sat on the mat then that hat then".split()


def toy_pieces(own=()):
    """(text, score, type): control, bytes, characters, and every prefix and pair in some words."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    longer = sorted(
        {
            word[a:b]
            for word in (SPACE + word for word in WORDS)
            for a in range(len(word))
            for b in range(a + 2, len(word) + 1)
        },
        key=lambda piece: (len(piece), piece),
    )
    letters = sorted({SPACE, *"".join(WORDS)})
    pieces += [(piece, -float(i), 1) for i, piece in enumerate([*longer, *letters])]
    return pieces + [(piece, 0.0, 4) for piece in own]


def model_bytes(pieces, model_type=2, byte_fallback=1, dummy_prefix=1, remove_extra=0):
    """A tokenizer.model: ModelProto with its pieces, trainer_spec and normalizer_spec."""
    parts = [(1, message([(1, text), (2, score), (3, kind)])) for text, score, kind in pieces]
    parts.append((2, message([(3, model_type), (4, 1000), (35, byte_fallback)])))
    parts.append((3, message([(1, "identity"), (3, dummy_prefix), (4, remove_extra)])))
    return message(parts)


def reference_bpe(pieces, text):
    """SentencePiece's BPE, plainly: of all neighbours the pair that makes the best piece, again."""
    scores = {piece: score for piece, score, kind in pieces if kind == 1}
    ids = {piece: i for i, (piece, *_) in enumerate(pieces)}
    parts = list(SPACE + text.replace(" ", SPACE))
    while True:
        pairs = [
            (scores[left + right], -i)
            for i, (left, right) in enumerate(zip(parts, parts[1:]))
            if left + right in scores
        ]
        if not pairs:
            break
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    known = [[ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()] for p in parts]
    return [token for part in known for token in part]
