"""A GGUF file from a Hugging Face folder of Gemma 2, and its quantised copies: `peer_llama_files.py FOLDER OUT`.

OUT names the format: bf16.gguf is written from the folder, q4_0.gguf and q8_0.gguf from the bf16.gguf beside them.
The vocabulary is left out, since the benchmark speaks token ids. The rest is as llama.cpp's own converter writes it.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as ll
import numpy as np

FORMATS = {"q4_0": ll.LLAMA_FTYPE_MOSTLY_Q4_0, "q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0}


def convert(folder: Path, out: Path) -> None:
    """Write every tensor as it is stored, except the norms: float32, with the 1 added that the model adds."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "gemma2")
    _describe(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, config["num_hidden_layers"])
    for name, bits in _tensors(folder):
        target = names.get_name(name, try_suffixes=(".weight",))
        if target is None:
            raise SystemExit(f"llama.cpp has no name for {name}")
        if name.endswith("norm.weight"):
            writer.add_tensor(target, (bits.astype(np.uint32) << 16).view(np.float32) + 1)
        else:
            writer.add_tensor(target, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def _tensors(folder: Path) -> Iterator[tuple[str, "np.ndarray[Any, Any]"]]:
    """Names and bf16 values as 16-bit integers, mapped, not read: numpy has no bf16, and a copy would not fit."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        data = np.memmap(path, np.uint8, mode="r", offset=8 + length)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{name} is {entry['dtype']}, not BF16")
            start, end = entry["data_offsets"]
            yield name, data[start:end].view(np.uint16).reshape(entry["shape"])


def quantise(source: Path, out: Path, format: str) -> None:
    """What `llama-quantize` does without options."""
    params = ll.llama_model_quantize_default_params()
    params.ftype = FORMATS[format]
    if ll.llama_model_quantize(str(source).encode(), str(out).encode(), params):
        raise SystemExit(f"llama.cpp could not quantise {source}")


def main() -> None:
    """Command line. Files appear under their name only when they are whole."""
    folder, out = map(Path, sys.argv[1:])
    partial = out.with_name(f"{out.name}.part")
    if out.stem == "bf16":
        convert(folder, partial)
    else:
        quantise(out.with_name("bf16.gguf"), partial, out.stem)
    partial.replace(out)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    print(f"{out.name}: matrices {types['blk.0.ffn_up.weight']}, tied embedding and head {types['token_embd.weight']}")


if __name__ == "__main__":
    main()
