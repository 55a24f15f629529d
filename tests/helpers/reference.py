"""An independent count: one prompt at a time, from what the routers themselves return; no code of the adapter."""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class Routing:
    """What the routers of one sequence returned, by true layer index."""

    ids: dict[int, np.ndarray] = field(default_factory=dict)
    weights: dict[int, np.ndarray] = field(default_factory=dict)
    logits: dict[int, np.ndarray] = field(default_factory=dict)


def greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy continuation by full forwards, without cache and without stop tokens."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def route(model: Any, tokens: list[int]) -> Routing:
    """One forward over a sequence; every module that returns (logits, weights, ids) in some order is a router."""
    found = Routing()
    handles = []

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if not isinstance(output, tuple) or len(output) != 3 or not all(torch.is_tensor(part) for part in output):
                return
            ids = [part for part in output if part.dtype == torch.int64 and part.ndim == 2]
            floats = [part for part in output if part.is_floating_point() and part.ndim == 2]
            if len(ids) != 1 or len(floats) != 2:
                return
            floats.sort(key=lambda part: part.shape[1])
            assert layer not in found.ids
            found.ids[layer] = ids[0].numpy()
            found.weights[layer] = floats[0].numpy().astype(np.float64)
            found.logits[layer] = floats[1].numpy().astype(np.float64)

        return hook

    for name, module in model.named_modules():
        match = re.search(r"layers\.(\d+)\.", name)
        if match:
            handles.append(module.register_forward_hook(keep(int(match[1]))))
    with torch.no_grad():
        model(torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def distribution(logits: np.ndarray, scoring: str) -> np.ndarray:
    """Softmax or normalised sigmoid in float64."""
    softmax = scoring == "softmax"
    scores = np.exp(logits - logits.max(axis=1, keepdims=True)) if softmax else 1 / (1 + np.exp(-logits))
    return scores / scores.sum(axis=1, keepdims=True)


@dataclass
class Count:
    """Sums over requests: [D, P, L, E] each ([16, D, L, E] by split), layers in model order."""

    layers: list[int]
    selection: np.ndarray
    weights: np.ndarray
    probabilities: np.ndarray
    tokens: np.ndarray
    splits: np.ndarray


def split(prompt: list[int], seed: int = 0) -> int:
    """The split that DESIGN gives a prompt: a hash of the seed and its token ids, mod 16."""
    data = seed.to_bytes(8, "little") + b"".join(token.to_bytes(4, "little") for token in prompt)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") % 16


def count(
    model: Any,
    requests: list[tuple[list[int], list[int], int]],
    *,
    domains: int,
    experts: int,
    scoring: str,
    scale: float,
) -> Count:
    """Count requests (prompt, generated tokens, domain) one by one; the last generated token is never routed."""
    result: Count | None = None
    for prompt, generated, domain in requests:
        routed = list(prompt) + list(generated[:-1])
        routing = route(model, routed)
        layers = sorted(routing.ids)
        if result is None:
            shape = (domains, 2, len(layers), experts)
            result = Count(
                layers,
                np.zeros(shape, np.int64),
                np.zeros(shape),
                np.zeros(shape),
                np.zeros((domains, 2), np.int64),
                np.zeros((16, domains, len(layers), experts), np.int64),
            )
        assert layers == result.layers
        phase = (np.arange(len(routed)) >= len(prompt)).astype(int)
        result.tokens[domain] += np.bincount(phase, minlength=2)
        for slot, layer in enumerate(layers):
            ids, weights = routing.ids[layer], routing.weights[layer]
            cells = (
                np.full_like(ids, domain),
                np.broadcast_to(phase[:, None], ids.shape),
                np.full_like(ids, slot),
                ids,
            )
            np.add.at(result.selection, cells, 1)
            np.add.at(result.splits[split(prompt), domain, slot], ids, 1)
            np.add.at(result.weights, cells, weights / scale)
            np.add.at(result.probabilities, (domain, phase, slot), distribution(routing.logits[layer], scoring))
    assert result is not None
    return result
