"""Compare the generation speed of a Llama with dense and with block-sparse layers in one run.

    python examples/generate.py                  # 2048 wide, 16 layers, bf16: for a GPU
    python examples/generate.py --mode graph     # without torch.compile
    python examples/generate.py --host           # also the host's time for the call of one layer
    python examples/generate.py --width 256 --hidden 1024 --layers 2 --heads 4 --kv-heads 2 \
        --vocabulary 1000 --batches 1 4 --prefill 2 64 --new 16 --rounds 3    # a quick try

The weights are random. Decoding is greedy, after a short prompt and with a static cache; `--mode`
says how its steps run: `compile` uses torch.compile and, on a GPU, captures the compiled step in a
CUDA graph; `graph` captures the eager step. A prefill computes the logits after a text and keeps no
cache; `compile` compiles its layers. Before anything is timed, each block-sparse model is compared
with its dense copy, and each compiled or captured step with the eager one. The models take turns,
so that all run under the same conditions of the machine. The peak memory of a model consists of its
weights and of what its preparation and runs allocate.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import inspect
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from sparse_lightning import BlockSparseLinear, densify, sparsify

# Patterns of the layers that become block-sparse; the output head stays dense.
MLPS, ALL = ["gate_proj", "up_proj", "down_proj"], [r"re:model\.layers\..*"]

Models = Mapping[str, tuple[nn.Module, int]]  # and the bytes of the weights on the GPU
Run = tuple[Callable[[], object], Callable[[], object]]  # an untimed start, and what is timed


@torch.no_grad()
def main() -> None:
    """Print a table for each batch size, one for the prefill, and one for the host on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {
        "width": 2048, "hidden": 8192, "layers": 16, "heads": 32, "kv-heads": 8,
        "vocabulary": 32_000, "prompt": 32, "new": 128, "rounds": 5,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prefill", type=int, nargs=2, default=[8, 2048], help="batch, tokens")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--mlp-densities", type=float, nargs="*", default=[0.25])
    parser.add_argument(
        "--densities", type=float, nargs="*", default=[0.25, 0.1], help="all layers"
    )
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=best)
    parser.add_argument("--mode", choices=["eager", "compile", "graph"], help="of a decoding step")
    parser.add_argument("--host", action="store_true")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.mode = options.mode or ("compile" if on_gpu else "eager")
    if options.mode == "graph" and not on_gpu:
        parser.error("`--mode` must be eager or compile on a CPU; got graph.")
    options.dtype = torch.bfloat16 if on_gpu else torch.float32
    print(torch.cuda.get_device_name() if on_gpu else "CPU", options.dtype, options.mode, sep=", ")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")

    models = {"dense": build(options)}
    for size in options.block_sizes:
        parts = [("MLPs", MLPS, density) for density in options.mlp_densities]
        parts += [("all layers", ALL, density) for density in options.densities]
        for part, include, density in parts:
            sparse = {"include": include, "block_size": size, "density": density}
            models[f"{part} at {density}, blocks of {size}"] = build(options, **sparse)
    for name, (model, _) in models.items():
        check_sparse(model, name, options)
    torch._dynamo.config.recompile_limit = len(models)  # `Decoder.step` is compiled for each

    for batch in options.batches:
        torch.compiler.reset()
        prompt = torch.randint(options.vocabulary, (batch, options.prompt), device=options.device)
        print(f"\nDecoding, batch {batch}, {options.new} tokens after {options.prompt}:")
        make = functools.partial(decoding, prompt=prompt, options=options)
        compare(models, make, batch * options.new, options.rounds)
    text = torch.randint(options.vocabulary, tuple(options.prefill), device=options.device)
    print(f"\nPrefill, {text.shape[0]} x {text.shape[1]} tokens:")
    torch.compiler.reset()
    make = functools.partial(prefill, text=text, options=options)
    compare(models, make, text.numel(), options.rounds)
    if options.host:
        time_host(options)


def build(options: argparse.Namespace, **sparse: Any) -> tuple[nn.Module, int]:
    """Return a model with random weights, sparsified if there are keywords, and its bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocabulary,
    )
    before = torch.cuda.memory_allocated()
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=options.dtype).eval()
    if sparse:
        sparsify(model, **sparse)
    return model, torch.cuda.memory_allocated() - before


def check_sparse(model: nn.Module, name: str, options: argparse.Namespace) -> None:
    """Raise RuntimeError unless a model's logits are those of its dense copy."""
    dense = densify(copy.deepcopy(model))
    for shape in [*((batch, 1) for batch in options.batches), tuple(options.prefill)]:
        text = torch.randint(options.vocabulary, shape, device=options.device)
        found, expected = (each(text, logits_to_keep=1).logits for each in (model, dense))
        check_close(found, expected, f"{name}, input {shape}")


def check_close(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise RuntimeError if logits differ by more than rounding errors."""
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    limit = 1e-4 if found.dtype == torch.float32 else 0.05
    if not error < limit:
        raise RuntimeError(f"The logits' error must be below {limit}; got {error:.3g} ({what}).")


class Decoder:
    """Greedy decoding of a batch. A step reads and writes only tensors, so it can be captured.

    Attributes:
        tokens: int64 `[batch, prompt + new + 1]`, the prompt and the tokens generated after it.
        position: int64 `[1]`, the position of the newest token, which is the next step's input.
        advance: runs a step: `step` itself, or the same compiled or captured.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, new: int) -> None:
        self.model, self.prompt, self.new = model, prompt, new
        length = prompt.shape[1]
        self.cache = StaticCache(config=model.config, max_cache_len=length + new)
        self.tokens = prompt.new_zeros(prompt.shape[0], length + new + 1)
        self.position = prompt.new_zeros(1)
        self.advance: Callable[[], Tensor] = self.step
        # Transformers has renamed the argument during version 5.
        is_renamed = "cache" in inspect.signature(model.forward).parameters
        self.cache_argument = {"cache" if is_renamed else "past_key_values": self.cache}

    def start(self) -> None:
        """Fill the cache with the prompt, and choose the first token."""
        length = self.prompt.shape[1]
        self.cache.reset()
        logits = self.logits(self.prompt, torch.arange(length, device=self.prompt.device))
        self.tokens[:, :length] = self.prompt
        self.tokens[:, length] = logits.argmax(-1)
        self.position.fill_(length)

    def step(self) -> Tensor:
        """Append one token; return its logits, `[batch, vocabulary]`."""
        logits = self.logits(self.tokens.index_select(1, self.position), self.position)
        self.position.add_(1)
        self.tokens.index_copy_(1, self.position, logits.argmax(-1, keepdim=True))
        return logits

    def run(self) -> None:
        """Append `new` tokens."""
        for _ in range(self.new):
            self.advance()

    def logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Write keys and values at some positions of the cache; return the last one's logits."""
        output = self.model(
            ids,
            position_ids=positions[None],
            cache_position=positions,  # read by Transformers 4; the caches of 5 count themselves
            use_cache=True,
            logits_to_keep=1,
            **self.cache_argument,
        )
        return output.logits[:, -1]


def decoding(model: nn.Module, prompt: Tensor, options: argparse.Namespace) -> Run:
    """Return the decoding of a batch in the chosen mode, after comparing it with the eager one."""
    decoder = Decoder(model, prompt, options.new)
    decoder.start()
    expected = decoder.step().clone()  # loads the kernels, too, which a capture cannot do
    if options.mode == "compile":
        decoder.advance = torch.compile(decoder.step, fullgraph=True, dynamic=False)
    if options.mode != "eager" and options.device == "cuda":
        decoder.advance = capture(decoder)
    decoder.start()
    check_close(decoder.advance(), expected, f"{options.mode}, batch {len(prompt)}")
    return decoder.start, decoder.run


def capture(decoder: Decoder) -> Callable[[], Tensor]:
    """Return the replay of a CUDA graph of one step."""
    decoder.start()
    side = torch.cuda.Stream()  # PyTorch asks for a warm-up on another stream
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        decoder.advance()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decoder.advance()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def prefill(model: nn.Module, text: Tensor, options: argparse.Namespace) -> Run:
    """Return the computation of the logits after a text."""
    if options.mode == "compile":
        for layer in model.model.layers:
            layer.compile(fullgraph=True, dynamic=False)
    return lambda: None, lambda: model(text, use_cache=False, logits_to_keep=1)


def compare(models: Models, make: Callable[[nn.Module], Run], tokens: int, rounds: int) -> None:
    """Time a run of each model, which computes some tokens, and print a table."""
    runs, memory = {}, {}
    for name, (model, weights) in models.items():
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runs[name] = make(model)
        alternate({name: runs[name]}, 1)
        memory[name] = weights + torch.cuda.max_memory_allocated() - before
    times = alternate(runs, rounds)
    print("| model | tokens per second | speed-up | peak memory |\n|---|---|---|---|")
    for name, found in times.items():
        rate = tokens / statistics.median(found)
        speedup = statistics.median(map(float.__truediv__, times["dense"], found))
        used = f"{memory[name] / 2**30:.2f} GiB" if memory[name] else "not measured"
        print(f"| {name} | {rate:,.0f} | {speedup:.2f} | {used} |", flush=True)


def alternate(runs: Mapping[str, Run], rounds: int, waits: bool = True) -> dict[str, list[float]]:
    """Return the seconds of each run, in rounds of one run each, with the GPU's work if `waits`."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (start, run) in runs.items():
            start()
            wait()
            begin = time.perf_counter()
            run()
            if waits:
                wait()
            times[name].append(time.perf_counter() - begin)
    return times


def time_host(options: argparse.Namespace) -> None:
    """Print how long an eager call of one layer, for one token, occupies the host."""
    x = torch.randn(1, 1, options.width, device=options.device, dtype=options.dtype)
    linear = nn.Linear(options.width, options.hidden, bias=False).to(x)
    layers: dict[str, nn.Module] = {"nn.Linear": linear}
    for size in options.block_sizes:
        for density in dict.fromkeys([*options.mlp_densities, *options.densities]):
            layer = BlockSparseLinear.from_linear(linear, block_size=size, density=density)
            layers[f"density {density}, blocks of {size}"] = layer
    calls = range(200)  # their kernels fit into the GPU's queue, so the host does not wait
    runs = {n: (lambda f=f: f(x), lambda f=f: [f(x) for _ in calls]) for n, f in layers.items()}
    print(f"\nHost, a call of a layer {options.width} -> {options.hidden} for one token:")
    print("| layer | µs |\n|---|---|")
    for name, found in alternate(runs, options.rounds, waits=False).items():
        print(f"| {name} | {statistics.median(found) / len(calls) * 1e6:.1f} |")


if __name__ == "__main__":
    main()
