"""The files that make a model's text, held as {name: content}: of a folder, a GGUF file, a
checkpoint or a 4-bit file. What holds them needs no other folder, and they go wherever it goes.

    tokenizer.json           the vocabulary; made here where a folder has it in another form
    tokenizer_config.json    special tokens by name, whether a text begins with one
    special_tokens_map.json  the same, in older folders
    chat_template.jinja      the chat format, unless tokenizer_config.json has it
    generation_config.json   the ids that end a text
"""

import json
from pathlib import Path

from leangpt.system.errors import UserError, refused
from leangpt.system.reading import read_json, regular_file
from leangpt.system.whole_files import write_whole
from leangpt.text import sentencepiece
from leangpt.text.tokenizer_json import byte_level_bpe, put_around, read_merges

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
TEXT_FILES = (TOKENIZER, SETTINGS, "special_tokens_map.json", TEMPLATE, GENERATION)
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
OTHER_VOCABULARIES = ("vocab.txt", "tekken.json", "vocab.json", "merges.txt")  # not read (alone)
GO_TOGETHER = {"vocab.json": "merges.txt", "merges.txt": "vocab.json"}
SOURCES = (*TEXT_FILES, *SENTENCEPIECE, *OTHER_VOCABULARIES, "added_tokens.json", "config.json")


def read_text_files(folder) -> dict[str, str]:
    """{name: content} of a model's folder, the vocabulary as a tokenizer.json in any case; {} where
    there is none. Raises UserError for a vocabulary that is not read, by name, and a damaged file.
    """
    folder = Path(folder)
    files = {name: read(folder / name) for name in TEXT_FILES if (folder / name).exists()}
    if TOKENIZER not in files:
        made = _made_tokenizer(folder)
        if made is None:
            return {}
        files |= made
    if GENERATION not in files:  # as transformers: only where there is none
        ends = None
        if (folder / "config.json").exists():
            ends = read_json(folder / "config.json").get("eos_token_id")
        files[GENERATION] = json.dumps({} if ends is None else {"eos_token_id": ends}) + "\n"
    return files


def read(path):
    """The text of a file, without a byte order mark. UserError where it is none."""
    try:
        return regular_file(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise refused(f"cannot read {path}", error) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def parse(files, name, where):
    """The JSON object (dict) of one of `files`, {} where it is absent. Raises UserError."""
    try:
        content = json.loads(files.get(name, "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}/{name} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}/{name} must hold a JSON object, not {type(content).__name__}")
    return content


def write_text_files(files, folder) -> None:
    """Write `files` into a folder, each whole, and remove another tokenizer's files from it.

    Raises UserError where the folder takes none.
    """
    for name in TEXT_FILES:
        path = Path(folder) / name
        if name in files:
            write_whole(path, files[name].encode())
        elif path.is_file():
            path.unlink()


def _made_tokenizer(folder):
    """A folder's tokenizer.json and tokenizer_config.json, made of what it has, or None."""
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    found = [name for name in SENTENCEPIECE if (folder / name).exists()]
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        vocabulary = read_json(folder / "vocab.json")
        merges = read_merges(read(folder / "merges.txt"), folder / "merges.txt")
        space = bool(settings.get("add_prefix_space", False))
        tokenizer = byte_level_bpe(vocabulary, merges, prefix_space=space, where=folder)
        own = [name for name in ("<|endoftext|>",) if name in vocabulary]
        defaults = dict.fromkeys(("bos_token", "eos_token", "unk_token"), own[0]) if own else {}
    elif found:
        content = regular_file(folder / found[0]).read_bytes()
        pieces = sentencepiece.read_model(content, folder / found[0])
        tokenizer = sentencepiece.tokenizer_json(pieces, bool(settings.get("legacy", True)))
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        defaults = {name: text for name, text in names.items() if text in pieces.texts}
        if settings.get("add_bos_token", True):
            tokenizer = put_around(tokenizer, defaults.get("bos_token"))
    else:
        other = [name for name in OTHER_VOCABULARIES if (folder / name).exists()]
        if other:
            lacks = GO_TOGETHER.get(other[0])
            without = f" without {lacks}: copy it there, or" if lacks else ";"
            raise UserError(
                f"{folder}: a vocabulary of the kind {other[0]} is not read{without} save the "
                "model's tokenizer with transformers, which writes tokenizer.json"
            )
        return None
    added = folder / "added_tokens.json"
    if added.exists() and "added_tokens_decoder" not in settings:
        numbers = read_json(added)
        defaults["added_tokens_decoder"] = {
            str(number): {"content": text, "special": text in map(str, settings.values())}
            for text, number in numbers.items()
        }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | defaults | settings
    return {TOKENIZER: tokenizer + "\n", SETTINGS: json.dumps(settings, indent=1) + "\n"}
