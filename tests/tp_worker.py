"""One rank of test_tp.py: loads its share of every model listed, and compares with the whole one's.

argv: a JSON file of [{"name", "path", "tokens" [B, T], "logits": safetensors file, "greedy"}].
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

import tp
from checkpoint import open_checkpoint
from engine import Engine
from kernels import native
from sampling import Sampling
from speculative import SpeculativeEngine

GREEDY = Sampling(temperature=0)


def main() -> None:
    native.load()
    native.set_exact_activations(True)
    ranks = tp.start("cpu")
    results = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        checkpoint = open_checkpoint(case["path"])
        config = checkpoint.config
        whole = (ranks, checkpoint, config, None, "cpu", torch.float32)
        load = lambda args=whole: tp.load_ranked(*args)  # noqa: E731
        model = load()
        prompts = case["tokens"]
        engine = Engine(model, GREEDY, batch=len(prompts), length=96)
        with torch.inference_mode():
            logits = engine.prefill(prompts)
        error = (logits - load_file(case["logits"])["logits"]).abs().max().item()
        engine.cached = []
        ids = engine.generate(prompts, 12).token_ids
        layers = [model.layers[0].attention.wo, model.layers[0].feed_forward.w2]
        size = sum(t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values())
        result = {"name": case["name"], "error": error, "same": ids == case["greedy"],
                  "cut": [type(x).__name__ for x in layers], "bytes": size}  # fmt: skip
        if case["name"] in ("fp32", "int4") and ranks.size == 2:  # compiling takes long
            for mode, kind in (("default", Engine), (None, SpeculativeEngine)):
                args = (model, GREEDY) if kind is Engine else (model, GREEDY, 3, load())
                other = kind(*args, length=96, compile_mode=mode)
                if kind is SpeculativeEngine:
                    other.pace.verdict = lambda: None
                result[kind.__name__] = other.generate(prompts[:1], 12).token_ids[0]
        results.append(result)
    gathered = [None] * ranks.size
    dist.all_gather_object(gathered, results)
    if ranks.rank == 0:
        print(json.dumps(gathered))


if __name__ == "__main__":
    main()
