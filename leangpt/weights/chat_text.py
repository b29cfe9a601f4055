"""The text of a published model, found by its name: a folder's, a GGUF file's, or GPT-2's own."""

from leangpt.system.errors import UserError
from leangpt.system.reading import read_json
from leangpt.text.model_text import ModelText, text_of_files
from leangpt.text.text_files import SOURCES, read_text_files
from leangpt.text.tokens import GPT2Tokenizer
from leangpt.weights.find import ALL_FILES, GPT2_SIZES, find_pretrained, open_weights
from leangpt.weights.gguf import GGUFWeights
from leangpt.weights.gguf_text import gguf_text_files

END_OF_GPT2 = 50256
GPT2_SHAPES = {(12, 768), (24, 1024), (36, 1280), (48, 1600)}  # layers, width


def load_pretrained_text(name_or_dir, text_only: bool = False) -> ModelText:
    """ModelText of a model named as for load_pretrained.

    text_only: its weights are not wanted, so of a hub id they are not downloaded.
    A folder's own files count; a GGUF file's metadata before what lies beside it. Raises UserError
    where there is no tokenizer, or a file is damaged. OpenAI's vocabulary is GPT-2's alone: it is
    taken for the four names, and, with a note, for weights of exactly such a shape without files.
    """
    path = find_pretrained(name_or_dir, SOURCES if text_only else ALL_FILES)
    folder = path if path.is_dir() else path.parent
    beside = read_text_files(folder)
    if path.suffix == ".gguf" or any(folder.glob("*.gguf")):
        weights = open_weights(path)
        if isinstance(weights, GGUFWeights):
            files, notes = gguf_text_files(weights.metadata, weights.path, beside)
            return text_of_files(files, weights.path, notes)
    if beside:
        return text_of_files(beside, folder)
    if str(name_or_dir) not in GPT2_SIZES and not _is_gpt2(folder):
        raise UserError(f"{folder} has no tokenizer.json: copy the model's own into it")
    text = ModelText(GPT2Tokenizer(), (END_OF_GPT2,))
    if str(name_or_dir) not in GPT2_SIZES:
        text.notes.append(f"{folder} has no tokenizer, and GPT-2's shape: GPT-2's own is taken")
    return text


def _is_gpt2(folder):
    """Has it the shape of one of OpenAI's four?"""
    if not (folder / "config.json").exists():
        return False
    hf = read_json(folder / "config.json")
    wanted = {"model_type": "gpt2", "vocab_size": END_OF_GPT2 + 1, "n_positions": 1024}
    shape = hf.get("n_layer"), hf.get("n_embd")
    return shape in GPT2_SHAPES and all(hf.get(key) == value for key, value in wanted.items())
