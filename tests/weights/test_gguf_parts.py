"""A GGUF model in several files is read whole, from any part or the folder, or refused."""

import pytest
import torch
from test_gguf import LLAMA_METADATA, gguf_llama, logits, toy_vocabulary

from leangpt.system.errors import UserError
from leangpt.weights.chat_text import load_pretrained_text
from leangpt.weights.load import load_pretrained
from model import GPT

gguf = pytest.importorskip("gguf")


def split(folder, count=3, said=None, name="tiny"):
    """A tiny model in `count` parts, as gguf-split writes them; returns (whole file, parts)."""
    whole = gguf_llama(folder / "whole.gguf", changes=toy_vocabulary())
    tensors = {}

    def keep(found):
        tensors.update(found)

    gguf_llama(folder / "again.gguf", damage=keep)
    (folder / "again.gguf").unlink()
    names, parts = sorted(tensors), []
    for i in range(count):
        metadata = {**LLAMA_METADATA, **toy_vocabulary()} if i == 0 else {}
        path = folder / "parts" / f"{name}-{i + 1:05}-of-{count:05}.gguf"
        path.parent.mkdir(exist_ok=True)
        writer = {n: tensors[n] for n in names[i::count]}
        write_part(path, writer, metadata, i, said or count)
        parts.append(path)
    return whole, parts


def write_part(path, tensors, metadata, number, count):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", count)
    for key, value in metadata.items():
        key = key if key.startswith("tokenizer") else f"llama.{key}"
        kind = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kind.get(type(value), writer.add_array)(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_part_and_the_folder_are_the_whole(tmp_path):
    whole, parts = split(tmp_path)
    want = logits(load_pretrained(GPT, whole))
    encoded = load_pretrained_text(whole).tokenizer.encode("he he")
    for place in (*parts, tmp_path / "parts"):
        torch.testing.assert_close(logits(load_pretrained(GPT, place)), want, atol=0, rtol=0)
        assert load_pretrained_text(place).tokenizer.encode("he he") == encoded


def test_a_missing_part_is_named(tmp_path):
    _, parts = split(tmp_path)
    parts[1].unlink()
    for place in (parts[0], parts[2], tmp_path / "parts"):
        with pytest.raises(UserError, match="one of 3 parts.*tiny-00002-of-00003.gguf is missing"):
            load_pretrained(GPT, place)


def test_a_part_under_another_name_is_no_model(tmp_path):
    _, parts = split(tmp_path, 1, said=3)
    alone = parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(UserError, match="part 1 of 3 of a model"):
        load_pretrained(GPT, alone)


def test_names_and_contents_that_disagree(tmp_path):
    _, parts = split(tmp_path, 2)
    first, second = (path.read_bytes() for path in parts)
    parts[0].write_bytes(second)
    parts[1].write_bytes(first)
    with pytest.raises(UserError, match="says that it is part 2 of 2, its name says 1 of 2"):
        load_pretrained(GPT, parts[0])


def test_two_models_in_parts_are_several(tmp_path):
    split(tmp_path, 2)
    split(tmp_path, 2, name="other")
    with pytest.raises(UserError, match="several GGUF files"):
        load_pretrained(GPT, tmp_path / "parts")
