"""Vocabularies that came in another form, made into the tokenizer.json that everyone reads."""

from leangpt.system.errors import UserError

# How byte-level BPE cuts text before merging, by the name that llama.cpp has for it: the pattern,
# or None for GPT-2's own; and whether words that are tokens stay whole whatever the merges say.
GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ONE_DIGIT = GPT4_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
CUTS = {
    **dict.fromkeys(("gpt-2", "gpt2"), (None, False)),
    "smollm": (r"\p{N}", False),  # digits apart, the rest as GPT-2
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (GPT4_WORDS, True)),
    "qwen2": (ONE_DIGIT, False),
}
ENDS_IN_PATTERN = (GPT4_WORDS, ONE_DIGIT)  # these leave no second cutting to GPT-2's pattern


def byte_level_bpe(
    vocabulary, merges, cut="gpt-2", special=(), whole=(), prefix_space=False, where=""
):
    """A tokenizer.json (str) of byte-level BPE.

    vocabulary: {token: id}; merges: [(left, right)], the first first; cut: a key of CUTS.
    special, whole: tokens whose text is never split; the former are control tokens.
    where: what they are of. Raises UserError, beginning with that, where they make no tokenizer.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    pattern, ignore_merges = CUTS[cut]
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)
    except Exception as error:  # the package raises a bare Exception
        whose = f"{where}: its" if where else "the"
        reason = " ".join(str(error).split())[:200]
        message = f"{whose} vocabulary and merges do not make a tokenizer ({reason})"
        raise UserError(message) from None
    tokenizer = Tokenizer(model)
    cuts = []
    if pattern == r"\p{N}":
        cuts.append(pre_tokenizers.Digits(individual_digits=True))
    elif pattern:
        cuts.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    by_words = pattern not in ENDS_IN_PATTERN
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=by_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in whole])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return tokenizer.to_str()


def read_merges(text, where):
    """[(left, right)] of a merges.txt's text. Raises UserError, beginning with `where`."""
    merges = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or number == 1 and line.startswith("#version"):
            continue
        pair = tuple(line.rstrip("\r").split(" "))
        if len(pair) != 2:
            raise UserError(f"{where}, line {number}: two tokens are merged, not {line[:40]!r}")
        merges.append(pair)
    return merges


def table(pieces):
    """A tokenizer.json (str) that takes the longest of `pieces` that fits, again and again.

    Ids follow their order. A piece is an added token: those are found first, the longest first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in pieces])
    return tokenizer.to_str()


def put_around(content, first=None, last=None):
    """A tokenizer.json (str) whose every text begins and ends with these tokens (str), or with
    nothing where they are None; whatever it had for that is dropped. UserError for unknown ones."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_str(content)
    special = {part: tokenizer.token_to_id(part) for part in (first, last) if part}
    if None in special.values():
        raise UserError(f"the tokenizer has no token {' or '.join(special)} to put around a text")
    parts = [part for part in (first, "$A", last) if part]
    tokenizer.post_processor = TemplateProcessing(
        single=parts, special_tokens=list(special.items())
    )
    return tokenizer.to_str()
