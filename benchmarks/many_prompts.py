"""Write a large prompt set with domains to standard output: pairs of the demo's prompts, each pair once.

python -m benchmarks.many_prompts --prompts 4000 > many.jsonl
moescope profile many.jsonl --model demo:stacked --engine vllm --max-tokens 64 --output-dir many
"""

import argparse
import json
import sys
from itertools import permutations

import numpy as np

from moescope.profiler.demo import prompts_path


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    by_domain: dict[str, list[str]] = {}
    for line in prompts_path().read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        by_domain.setdefault(item["domain"], []).append(item["prompt"])
    pairs = [(domain, *pair) for domain, texts in sorted(by_domain.items()) for pair in permutations(texts, 2)]
    if options.prompts > len(pairs):
        parser.error(f"--prompts: there are {len(pairs):,} pairs")
    for index in np.random.default_rng(options.seed).permutation(len(pairs))[: options.prompts]:
        domain, first, second = pairs[index]
        sys.stdout.write(json.dumps({"prompt": f"{first}\n\n{second}", "domain": domain}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
