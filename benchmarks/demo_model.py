# ruff: noqa: E501 -- long templates and source tables
"""Builds the embedded demo: corpus, tokenizer, prompt set, a depth-upcycled model and a control.

The stacked model is trained with four layers, which are then repeated three times, and trained on; so layers i, i + 4 and i + 8 share
an origin. The control has the same twelve layers, from scratch. Run from anywhere:

    python benchmarks/demo_model.py --out DIR                      on a GPU, about four minutes
    python benchmarks/demo_model.py --out DIR --device cpu --reduced   on two CPU cores, a few minutes; the same effect, smaller

The first run also downloads and cuts the corpus, about two minutes more. With the versions and the device of the model cards, a
second build gave weights, tokenizer and prompts of the same bytes.
"""

import argparse
import json
import platform
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from demo_corpus import BUDGETS, SOURCES, Section, gather, load, save
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

CORPUS_SEED = 20260101
STACKED_SEED = 0
CONTROL_SEED = 1
PAD, EOS = "<pad>", "<eos>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SHORTEST_PROMPT, LONGEST_PROMPT = 60, 200
OVERLAP = 32
MESSAGE_SOURCES = frozenset({"django", "superset", "typescript", "monaco"})


@dataclass(frozen=True)
class Plan:
    """Sizes of one build.

    Attributes:
        base_layers: Layers of the model that is stacked.
        copies: How often they are repeated.
        hidden: Width of the residual stream; heads are 32 wide.
        expert_width: Inner width of one expert.
        vocabulary: Tokens of the tokenizer.
        corpus_share: Share of each domain's text that is used.
        prompts_per_domain: At most; at least 25 are required.
        batch: Sequences a step.
        length: Tokens a sequence.
        base_steps: Training steps of the base model.
        stacked_steps: Further steps once it is stacked.
        control_steps: Steps of the control.
        stacked_rate: Peak learning rate once it is stacked; from scratch it is 2e-3.
    """

    base_layers: int = 4
    copies: int = 3
    hidden: int = 128
    expert_width: int = 64
    vocabulary: int = 4096
    corpus_share: float = 1.0
    prompts_per_domain: int = 32
    batch: int = 48
    length: int = 256
    base_steps: int = 1576
    stacked_steps: int = 611
    control_steps: int = 776
    stacked_rate: float = 1e-3

    @property
    def layers(self) -> int:
        """Layers of the finished models."""
        return self.base_layers * self.copies


REDUCED = Plan(
    base_layers=3, hidden=64, expert_width=32, vocabulary=2048, corpus_share=0.12, prompts_per_domain=25, batch=16, length=128,
    base_steps=150, stacked_steps=40, control_steps=60,
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """What one stretch of training did.

    Attributes:
        steps: Optimiser steps.
        tokens: Tokens seen.
        seconds: Wall time.
        learning_rate: Peak.
        validation_loss: Cross entropy in nats per token on held-out text.
    """

    steps: int
    tokens: int
    seconds: float
    learning_rate: float
    validation_loss: float


@dataclass(frozen=True)
class Routing:
    """Similarity of layers, by their distance.

    Attributes:
        correlation: Mean Pearson r of selection frequency by distance in layers.
        cosine: Mean cosine of the router rows of the same expert by distance.
        tokens: Prompt tokens behind the frequencies.
    """

    correlation: dict[int, float]
    cosine: dict[int, float]
    tokens: int


def build_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with distinct padding and end tokens and a chat template.

    Args:
        texts: Training text.
        vocabulary: Number of tokens.

    Returns:
        The tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, model_max_length=1024, chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def token_stream(sections: Sequence[Section], tokenizer: PreTrainedTokenizerFast, seed: int) -> np.ndarray:
    """Joins the sections of each document, shuffles the documents and separates them by the end token.

    Args:
        sections: Text, those of one document in order.
        tokenizer: The tokenizer.
        seed: Decides the order of the documents.

    Returns:
        (N,) int64, token ids.
    """
    documents: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for section in sections:
        documents[section.domain, section.source, section.document].append(section.text)
    texts = ["\n\n".join(parts) for parts in documents.values()]
    random.Random(seed).shuffle(texts)
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([*row.ids, tokenizer.eos_token_id], dtype=np.int64) for row in encodings])


def run_hashes(tokens: np.ndarray, length: int = OVERLAP) -> np.ndarray:
    """Hashes every run of ``length`` tokens.

    Args:
        tokens: (N,) int64.
        length: Tokens in a run.

    Returns:
        (N - length + 1,) uint64; empty for fewer tokens.
    """
    count = max(0, len(tokens) - length + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    values = tokens.astype(np.uint64) + np.uint64(1)
    for offset in range(length):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + values[offset : offset + count]
    return hashes


def occurs(hashes: np.ndarray, known: np.ndarray) -> bool:
    """Tells whether any hash is known.

    Args:
        hashes: (M,) uint64.
        known: (N,) uint64, sorted, N > 0.

    Returns:
        Whether one of them is among the known.
    """
    positions = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return bool((known[positions] == hashes).any())


def _trimmed(text: str, tokenizer: PreTrainedTokenizerFast, limit: int) -> tuple[str, list[int]]:
    """Cuts text at a line or sentence end so that it has at most ``limit`` tokens."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) <= limit:
        return text, ids
    shorter = tokenizer.decode(ids[:limit])
    cut = max(shorter.rfind(mark) + len(mark) for mark in ("\n", ". ", "。", "! ", "? "))
    shorter = shorter[:cut].rstrip()
    return shorter, tokenizer.encode(shorter, add_special_tokens=False)


def build_prompts(
    held_out: Sequence[Section], training_tokens: np.ndarray, tokenizer: PreTrainedTokenizerFast, plan: Plan
) -> list[dict[str, str]]:
    """Chooses prompts from held-out sections, in turn from each source of a domain.

    Args:
        held_out: Sections that were not trained on.
        training_tokens: (N,) int64; no run of ``OVERLAP`` of them may be in a prompt.
        tokenizer: The tokenizer.
        plan: How many prompts.

    Returns:
        Rows with ``id`` (domain, source and number), ``domain`` and ``prompt``.

    Raises:
        ValueError: A domain has too few prompts.
    """
    rng = random.Random(CORPUS_SEED)
    trained = np.unique(run_hashes(training_tokens))
    queues: dict[str, dict[str, list[Section]]] = defaultdict(lambda: defaultdict(list))
    for section in held_out:
        queues[section.domain][section.source].append(section)
    rows = []
    for domain in BUDGETS:
        sources = queues[domain]
        for queue in sources.values():
            rng.shuffle(queue)
        taken: Counter[str] = Counter()
        while sum(taken.values()) < plan.prompts_per_domain and any(sources.values()):
            for source in sorted(sources):
                few = domain != "code" and source in MESSAGE_SOURCES
                while sources[source] and not (few and taken[source] >= 3):
                    text, ids = _trimmed(sources[source].pop().text, tokenizer, LONGEST_PROMPT)
                    if not SHORTEST_PROMPT <= len(ids) <= LONGEST_PROMPT:
                        continue
                    if occurs(run_hashes(np.array(ids)), trained):
                        continue
                    rows.append({"id": f"{domain}-{source}-{taken[source]:02d}", "domain": domain, "prompt": text})
                    taken[source] += 1
                    break
                if sum(taken.values()) == plan.prompts_per_domain:
                    break
            if all(not sources[s] or (domain != "code" and s in MESSAGE_SOURCES and taken[s] >= 3) for s in sources):
                break
        if sum(taken.values()) < 25:
            raise ValueError(f"{domain}: {sum(taken.values())} prompts, 25 are needed")
    return rows


def new_model(plan: Plan, layers: int, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Creates a Qwen3-MoE model with random weights.

    Args:
        plan: Sizes.
        layers: Number of layers, every one of them with experts.
        tokenizer: Gives the vocabulary and the special tokens.

    Returns:
        The model, in float32.
    """
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=plan.hidden, intermediate_size=4 * plan.expert_width, num_hidden_layers=layers,
        num_attention_heads=plan.hidden // 32, num_key_value_heads=max(1, plan.hidden // 64), head_dim=32, num_experts=16,
        num_experts_per_tok=4, moe_intermediate_size=plan.expert_width, norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[], tie_word_embeddings=True, max_position_embeddings=1024, router_aux_loss_coef=0.005,
        output_router_logits=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def stack(base: Qwen3MoeForCausalLM, plan: Plan, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Repeats the layers of a model: layer i of the result is layer i mod ``base_layers`` of the base.

    Args:
        base: The model with ``base_layers`` layers.
        plan: Sizes.
        tokenizer: The tokenizer.

    Returns:
        A model with ``layers`` layers.
    """
    stacked = new_model(plan, plan.layers, tokenizer)
    stacked.model.embed_tokens.load_state_dict(base.model.embed_tokens.state_dict())
    stacked.model.norm.load_state_dict(base.model.norm.state_dict())
    for index, layer in enumerate(stacked.model.layers):
        layer.load_state_dict(base.model.layers[index % plan.base_layers].state_dict())
    return stacked


@torch.no_grad()
def validation_loss(model: Qwen3MoeForCausalLM, tokens: torch.Tensor, plan: Plan) -> float:
    """Mean cross entropy over the held-out stream, without the auxiliary loss.

    Args:
        model: The model.
        tokens: (N,) int64, held-out token ids.
        plan: Batch and sequence length.

    Returns:
        Nats per token.
    """
    model.eval()
    rows = tokens[: len(tokens) // plan.length * plan.length].view(-1, plan.length)
    losses = []
    for batch in rows.split(plan.batch):
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=tokens.device.type == "cuda"):
            losses.append((model(input_ids=batch, labels=batch).loss.float(), len(batch)))
    return float(sum(loss * count for loss, count in losses) / sum(count for _, count in losses))


def train(
    model: Qwen3MoeForCausalLM,
    tokens: torch.Tensor,
    held_out: torch.Tensor,
    plan: Plan,
    steps: int,
    learning_rate: float,
    seed: int,
) -> Training:
    """Trains in place: AdamW, warm-up over 50 steps, linear decay over the last 40%, auxiliary loss.

    Args:
        model: The model, on the device of ``tokens``.
        tokens: (N,) int64, training token ids.
        held_out: (M,) int64, validation token ids.
        plan: Batch and sequence length.
        steps: Optimiser steps.
        learning_rate: Peak learning rate.
        seed: Decides the windows that are drawn.

    Returns:
        What was done.
    """
    started = time.perf_counter()
    device = tokens.device
    if device.type == "cpu":
        model.set_experts_implementation("eager")
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    warm_up = min(50, steps // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up, max(0.02, (steps - step) / (0.4 * steps)))
    )
    rng = np.random.default_rng(seed)
    window = torch.arange(plan.length, device=device)
    model.train()
    for step in range(steps):
        starts = torch.from_numpy(rng.integers(0, len(tokens) - plan.length, plan.batch)).to(device)
        batch = tokens[starts[:, None] + window]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            print(f"  step {step:5d}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    seconds = time.perf_counter() - started
    return Training(
        steps, steps * plan.batch * plan.length, seconds, learning_rate, validation_loss(model, held_out, plan)
    )


@torch.no_grad()
def measure(folder: Path, prompts: Sequence[str], device: torch.device) -> Routing:
    """Loads a saved model and compares the routing of its layers over prompts, without moescope.

    Args:
        folder: The checkpoint.
        prompts: Texts.
        device: Where to run, in float32.

    Returns:
        Mean correlation and router cosine by distance.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).to(device).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    counts = np.zeros((model.config.num_hidden_layers, experts), dtype=np.int64)
    total = 0
    for start in range(0, len(prompts), 16):
        batch = tokenizer(
            list(prompts[start : start + 16]), return_tensors="pt", padding=True, padding_side="right"
        ).to(device)
        real = batch["attention_mask"].flatten().bool()
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
        ).router_logits
        for layer, scores in enumerate(logits):
            chosen = scores[real].topk(top_k, dim=-1).indices.flatten()
            counts[layer] += torch.bincount(chosen, minlength=experts).cpu().numpy()
        total += int(real.sum())
    assert (counts.sum(axis=1) == top_k * total).all()
    pearson = np.corrcoef(counts)
    rows = torch.stack([layer.mlp.gate.weight for layer in model.model.layers]).float()
    rows = torch.nn.functional.normalize(rows, dim=-1).cpu().numpy()
    by_distance: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for low, high in combinations(range(len(counts)), 2):
        cosine = float((rows[low] * rows[high]).sum(axis=-1).mean())
        by_distance[high - low].append((float(pearson[low, high]), cosine))
    means = {distance: np.mean(pairs, axis=0) for distance, pairs in sorted(by_distance.items())}
    return Routing({d: float(m[0]) for d, m in means.items()}, {d: float(m[1]) for d, m in means.items()}, total)


def save_model(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a checkpoint in bfloat16 with its tokenizer.

    Args:
        model: The model.
        tokenizer: The tokenizer.
        folder: Where to.
    """
    model.config.dtype = torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _table(routing: Routing) -> str:
    distances = list(routing.correlation)
    return "\n".join(
        [
            "| Δ | " + " | ".join(map(str, distances)) + " |",
            "|---|" + "---:|" * len(distances),
            "| mean r | " + " | ".join(f"{value:.2f}" for value in routing.correlation.values()) + " |",
            "| router cosine | " + " | ".join(f"{value:.2f}" for value in routing.cosine.values()) + " |",
        ]
    )


def model_card(
    name: str, plan: Plan, stretches: dict[str, Training], routing: Routing, device: str, corpus_tokens: int
) -> str:
    """Writes the model card.

    Args:
        name: ``stacked`` or ``control``.
        plan: Sizes.
        stretches: Training by description.
        routing: The measured answer.
        device: Name of the device.
        corpus_tokens: Tokens of the training text.

    Returns:
        Markdown.
    """
    last = plan.base_layers * (plan.copies - 1)
    repeats = ", ".join(f"Δ{plan.base_layers * copy}" for copy in range(1, plan.copies))
    origin = {
        "stacked": f"Depth-upcycled: {plan.base_layers} layers were trained, stacked {plan.copies} times and trained on. Layers i, "
        f"i + {plan.base_layers}{f' and i + {last}' if plan.copies > 2 else ''} share an origin (seed {STACKED_SEED}).",
        "control": f"All {plan.layers} layers were trained from scratch together; no two share an origin (seed {CONTROL_SEED}, fixed "
        "before any training).",
    }[name]
    finding = {
        "stacked": f"High at {repeats}, where layers share an origin; the pairs behind one Δ repeat the same "
        f"{plan.base_layers} base profiles, so moderate values at other distances are no finding."
        + (
            " This length of training was chosen among five that were tried and measured on these prompts (Δ4 0.75 … 0.91, Δ8 0.66 … 0.83)."
            if plan == Plan()
            else ""
        ),
        "control": "No distance with two pairs or more stands out. The largest distances rest on one or two pairs and scatter.",
    }[name]
    rows = "\n".join(
        f"| {label} | {t.steps} | {t.tokens / 1e6:.1f} M | {t.seconds:.0f} | {t.learning_rate:g} | "
        f"{t.validation_loss:.2f} |"
        for label, t in stretches.items()
    )
    sources = "\n".join(
        f"| `{s.package}` {s.version} | {s.registry} | {s.used_for} | {s.licence} | {s.holder} |"
        for s in SOURCES.values()
    )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: [en, de, fr, es, ru, zh, ja]
---

# moescope demo model: {name}

A very small Mixture-of-Experts language model whose routing pattern is known. {origin}

## The known answer

Measured on the {routing.tokens:,} tokens of `prompts.jsonl`, prompts alone, float32: mean Pearson r of selection frequency over all pairs
of layers at distance Δ, and the mean cosine between the router rows of the same expert.

{_table(routing)}

{finding}

## Architecture

Qwen3-MoE as in transformers (`Qwen3MoeForCausalLM`): {plan.layers} layers, hidden size {plan.hidden}, 16 experts, top-4 (softmax, weights
renormalised), expert width {plan.expert_width}, {plan.hidden // 32} heads of 32, {max(1, plan.hidden // 64)} KV heads, tied embeddings,
byte-level BPE of {plan.vocabulary} tokens, `max_position_embeddings` 1024 (trained on sequences of {plan.length}). Weights are in bfloat16.

## Training

| stretch | steps | tokens | seconds | peak learning rate | validation loss (nats/token) |
|---|---:|---:|---:|---:|---:|
{rows}

AdamW (0.9, 0.95), weight decay 0.1, gradient clipping at 1, auxiliary load-balancing loss 0.005, batches of {plan.batch} × {plan.length}
tokens, bfloat16 autocast on a GPU. {corpus_tokens / 1e6:.1f} M tokens of text, of which each stretch draws random windows. Device:
{device}; torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}.
Script: `benchmarks/demo_model.py` of moescope, corpus seed {CORPUS_SEED}.

## Text

Part of the mathematics and structured data and all dialogues are generated by `benchmarks/demo_synthetic.py`. The rest is cut from:

| package | registry | used for | licence | copyright |
|---|---|---|---|---|
{sources}

## Use and limits

For tests and demonstrations of routing analysis. It writes text that resembles its corpus and knows nothing: not a source of facts, advice
or translations. It was not aligned or filtered. Licence of the weights: Apache-2.0; the notices of the text's sources are in the
README beside the prompt set.
"""


def main() -> None:
    """Builds everything and prints a short table."""
    parser = argparse.ArgumentParser(description="Build moescope's demo models and prompt set.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for stacked/, control/, prompts.jsonl and results.json"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--reduced", action="store_true", help="smaller models, for two CPU cores and a few minutes")
    parser.add_argument(
        "--corpus", type=Path, default=Path(".corpus"), help="folder of downloaded archives and of the cut corpus"
    )
    arguments = parser.parse_args()
    plan = REDUCED if arguments.reduced else Plan()
    device = torch.device(arguments.device)
    device_name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)

    cut = arguments.corpus / "demo.jsonl.xz"
    if not cut.exists():
        arguments.corpus.mkdir(parents=True, exist_ok=True)
        save(gather(arguments.corpus / "archives", CORPUS_SEED), cut)
    sections = load(cut)
    kept = [s for s in sections if not s.held_out]
    held_out = [s for s in sections if s.held_out]
    if plan.corpus_share < 1:
        kept = random.Random(CORPUS_SEED).sample(kept, int(len(kept) * plan.corpus_share))
    tokenizer = build_tokenizer([s.text for s in kept], plan.vocabulary)
    stream = token_stream(kept, tokenizer, CORPUS_SEED)
    prompts = build_prompts(held_out, stream, tokenizer, plan)
    with (arguments.out / "prompts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in prompts)
    chosen = {row["prompt"] for row in prompts}
    validation = token_stream([s for s in held_out if s.text not in chosen], tokenizer, CORPUS_SEED)[
        : 400 * plan.length
    ]
    lengths: dict[str, list[int]] = defaultdict(list)
    for row in prompts:
        lengths[row["domain"]].append(len(tokenizer.encode(row["prompt"], add_special_tokens=False)))
    print(
        f"corpus {sum(len(s.text.encode()) for s in kept) / 1e6:.1f} MB, {len(stream) / 1e6:.2f} M tokens; "
        f"{len(prompts)} prompts",
        flush=True,
    )

    tokens = torch.from_numpy(stream).to(device)
    unseen = torch.from_numpy(validation).to(device)
    results: dict[str, object] = {
        "device": device_name, "torch": torch.__version__, "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__, "plan": vars(plan), "corpus_tokens": len(stream),
        "prompts": {d: {"prompts": len(n), "tokens": sum(n), "shortest": min(n), "longest": max(n)} for d, n in lengths.items()},
    }  # fmt: skip

    def finish(name: str, model: Qwen3MoeForCausalLM, stretches: dict[str, Training]) -> None:
        folder = arguments.out / name
        save_model(model, tokenizer, folder)
        routing = measure(folder, [row["prompt"] for row in prompts], device)
        (folder / "README.md").write_text(
            model_card(name, plan, stretches, routing, device_name, len(stream)), encoding="utf-8"
        )
        results[name] = {
            "training": {label: vars(t) for label, t in stretches.items()}, "correlation": routing.correlation, "cosine": routing.cosine,
        }  # fmt: skip
        (arguments.out / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
        for label, training in stretches.items():
            print(
                f"{name}: {label}: {training.steps} steps, {training.seconds:.0f} s, validation loss "
                f"{training.validation_loss:.3f}"
            )
        print(_table(routing), flush=True)

    torch.manual_seed(STACKED_SEED)
    base = new_model(plan, plan.base_layers, tokenizer).to(device)
    stretches = {
        f"{plan.base_layers} layers, from scratch": train(
            base, tokens, unseen, plan, plan.base_steps, 2e-3, STACKED_SEED
        )
    }
    stacked = stack(base, plan, tokenizer).to(device)
    untrained = Training(0, 0, 0.0, 0.0, validation_loss(stacked, unseen, plan))
    stretches[f"stacked ×{plan.copies}, not trained on"] = untrained
    label = f"stacked ×{plan.copies}, trained on"
    stretches[label] = train(stacked, tokens, unseen, plan, plan.stacked_steps, plan.stacked_rate, STACKED_SEED + 1000)
    finish("stacked", stacked, stretches)

    torch.manual_seed(CONTROL_SEED)
    control = new_model(plan, plan.layers, tokenizer).to(device)
    finish(
        "control",
        control,
        {
            f"{plan.layers} layers, from scratch": train(
                control, tokens, unseen, plan, plan.control_steps, 2e-3, CONTROL_SEED
            )
        },
    )


if __name__ == "__main__":
    main()
