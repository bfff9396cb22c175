"""How fast a language model is read on a GPU: activations alone, and harvested into a store.

    python scripts/bench_gpu_harvest.py [--models gpt2 smollm2 gemma-2-2b] [--json FILE] [--smoke]

Models of the real shapes with random weights (their values cost no time), written as folders and
opened as `model.path` opens yours; contexts of 128 random tokens. tokens/s by contexts in a forward
pass, median of 3 rounds; then a whole harvest into shards on this machine's disk. Needs no hub.
--smoke: tiny shapes, also without a GPU. --page: write the table of docs/performance.md from
docs/gpu_harvest.json, no more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_gpu import PAGE, POSITIONS, ROOT, card, device_for, parsed

from tcsae.base.signals import StopRequest
from tcsae.config.compose import config_of
from tcsae.data.contexts import Contexts
from tcsae.data.language_model import LanguageModel
from tcsae.data.store import ActivationStore

RESULTS = ROOT / "docs" / "gpu_harvest.json"
LAYERS = {"gpt2": 8, "smollm2": 15, "gemma-2-2b": 19}


def shape(name: str, smoke: bool) -> Any:
    from transformers import Gemma2Config, GPT2Config, LlamaConfig

    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if name == "gpt2":
        small: dict[str, Any] = {"n_embd": 48, "n_layer": 9, "n_head": 4, "vocab_size": 300}
        return GPT2Config(**special, **(small if smoke else {}))
    if name == "smollm2":
        return LlamaConfig(
            **special, vocab_size=300 if smoke else 49152, hidden_size=36 if smoke else 576,
            num_hidden_layers=16 if smoke else 30, intermediate_size=96 if smoke else 1536,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        )  # fmt: skip
    # Its defaults are those of gemma-2-2b but for the blocks' heads.
    small = {"hidden_size": 32, "num_hidden_layers": 20, "intermediate_size": 64, "head_dim": 8}
    return Gemma2Config(**special, **(small | {"vocab_size": 300} if smoke else {}))


def write_model(name: str, folder: Path, device: str, smoke: bool) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, utils

    utils.logging.disable_progress_bar()
    words = {word: number for number, word in enumerate(["<s>", "</s>", "<pad>", "a"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape(name, smoke), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def rate(model: LanguageModel, contexts: int, least: float) -> float:
    """Tokens a second of forward passes up to the hook, the activations left on the device."""
    ids = torch.randint(3, model.vocabulary, (contexts, POSITIONS))
    model.activations(ids)
    found = []
    for _ in range(3):
        started, passes = time.perf_counter(), 0
        while time.perf_counter() - started < least:
            x = model.activations(ids)
            passes += 1
            if x.is_cuda:
                torch.cuda.synchronize()
        found.append(passes * ids.numel() / (time.perf_counter() - started))
    return statistics.median(found)


def harvest(model: LanguageModel, folder: Path, n: int) -> float:
    """Tokens a second of a harvest into shards."""
    ids = torch.randint(3, model.vocabulary, (n, POSITIONS))
    contexts = Contexts(ids.int(), torch.ones_like(ids).short(), ids > 0, ("all",))
    store = ActivationStore(folder, model, contexts, 256)
    started = time.perf_counter()
    store.harvest(StopRequest())
    return ids.numel() / (time.perf_counter() - started)


def measure(name: str, device: str, smoke: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(name, Path(folder, "model"), device, smoke)
        rows: dict[str, Any] = {}
        for contexts in [4] if smoke else [16, 64, 256]:
            given = [f"model.path={path}", f"model.name={name}"]
            given += [f"model.forward_contexts={contexts}", f"layer={LAYERS[name]}"]
            cfg = config_of("model=other", *given)
            model = LanguageModel(cfg.model, cfg.layer)
            found = {"forward_tokens_s": rate(model, contexts, 0.05 if smoke else 1.0)}
            n = 16 if smoke else 2048
            found["store_tokens_s"] = harvest(model, Path(folder, f"store{contexts}"), n)
            rows[str(contexts)] = found
            print(f"{name}, {contexts} contexts a pass: {found}", flush=True)
        return rows


def write_page() -> None:
    from pages import block, replace_block

    results = json.loads(RESULTS.read_text())
    lines = [
        f"{results['card']}; contexts of {POSITIONS} tokens, bfloat16, random weights.",
        "",
        "| model | contexts a pass | tokens/s, read | tokens/s, into the store |",
        "|---|---|---|---|",
    ]
    for name, rows in results["models"].items():
        for contexts, row in rows.items():
            rates = [f"{row[key]:,.0f}" for key in ("forward_tokens_s", "store_tokens_s")]
            lines.append(f"| {name}, layer {LAYERS[name]} | {contexts} | {' | '.join(rates)} |")
    replace_block(PAGE, block("gpu harvest", "\n".join(lines)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    args = parsed(parser)
    if args.page:
        write_page()
        return
    device = device_for(args)
    results: dict[str, Any] = {"card": card(device), "models": {}}
    for name in args.models:
        results["models"][name] = measure(name, device, args.smoke)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
