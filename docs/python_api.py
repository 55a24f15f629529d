"""moescope from Python, step by step: record, analyse, draw, compare, weigh, export.

Run it as a script, or open it as a notebook (the `# %%` marks are cells):

    python docs/python_api.py results                                          # the embedded demo model
    python docs/python_api.py --quick results                                  # with fewer prompts
    python docs/python_api.py --profile a/profile.safetensors results          # a profile that exists
"""

# %% [markdown]
# # moescope from Python
#
# A `RoutingProfile` goes in, numbers and plotly figures come out. Nothing is written unless a line below says so.

# %%
import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

import moescope
from moescope.adapters.session import open_engine
from moescope.profiler.demo import prompts_path
from moescope.profiler.sidecars import load_routers, load_sample
from moescope.stats.activation import normalised_entropy
from moescope.stats.comparison import compare_activations, within_run
from moescope.stats.correlation import layer_correlation
from moescope.stats.periodicity import periodic_patterns
from moescope.stats.weight_similarity import WeightSimilarity
from moescope.viz.activation import activation_heatmap
from moescope.viz.analysis import activations
from moescope.viz.comparison import difference_heatmap
from moescope.viz.correlation import correlation_heatmap
from moescope.viz.findings import findings
from moescope.viz.load import load_by_layer
from moescope.viz.periodicity import periodic_bars, periodic_boxes
from moescope.viz.similarity import router_cosine_heatmap, router_norm_heatmap
from moescope.viz.surface import activation_surface
from moescope.viz.tables import tables
from moescope.viz.weight_findings import verdict_in_words
from moescope.viz.weights import expert_layer_heatmap

parser = argparse.ArgumentParser(description="moescope from Python, step by step.")
parser.add_argument("out", nargs="?", type=Path, default=Path("python_api_results"), help="folder for the results")
parser.add_argument("--quick", action="store_true", help="24 prompts of the demo rather than 64")
parser.add_argument("--profile", type=Path, help="a profile to load instead of recording the demo")
options = parser.parse_args([] if "ipykernel" in sys.modules else None)

# %% [markdown]
# ## 1. A profile: record one, or load one
#
# `moescope.profile` takes a checkpoint's folder, a hub id, `demo:stacked`, or a loaded transformers model, and prompts
# as texts or mappings. With `output_dir` the profile and a look at some tokens are kept there. Router weights are
# properties of the model, not of a run: they are read from the open model, or from what a run left beside its profile.

# %%
if options.profile is None:
    records = [json.loads(line) for line in prompts_path().read_text(encoding="utf-8").splitlines()]
    chosen = records[:: 16 if options.quick else 6]  # all twelve domains
    folder = options.out / "run"
    profile = moescope.profile(
        "demo:stacked",
        [{"prompt": record["prompt"], "domain": record["domain"]} for record in chosen],
        engine="transformers",
        max_tokens=4,
        output_dir=folder,
        force=True,
    )
    model = open_engine("demo:stacked", engine="transformers")
    router_weights = model.router_weights()  # one (experts, hidden) array a layer
    model.close()
    routers = None
else:
    folder = options.profile.parent
    profile = moescope.RoutingProfile.load(str(options.profile))
    router_weights, routers = None, load_routers(folder, profile.model)
sample = load_sample(folder, profile.model)

print(f"{profile.model.id}: {profile.tokens:,} tokens, {len(profile.model.layers)} MoE layers")
print(f"selection_counts: {profile.selection_counts.shape} (domains, phases, layers, experts)")

# %% [markdown]
# ## 2. Statistics

# %%
report = moescope.analyze(profile, router_weights=router_weights, routers=routers, sample=sample)
for sentence in findings(report):
    print(f"- {sentence}")
for pattern in report.periodic.patterns:
    print(f"  Δ = {pattern.delta:<3} mean r = {pattern.mean:+.2f} ± {pattern.std:.2f} over {pattern.num_pairs} pairs")

# %% [markdown]
# Every result is a frozen dataclass of numpy arrays, here (layers, experts), or one object a layer.

# %%
frequency = report.activation("frequency")
assert frequency is not None
entropy = normalised_entropy(frequency)  # 1: all experts alike, 0: one expert alone
for load in report.loads[:3]:
    print(f"layer {load.layer}: busiest {load.max_over_mean:.2f} × mean, {len(load.dead_experts)} never chosen")
print(f"entropy, mean over layers: {np.nanmean(entropy):.3f} of 1")

# %% [markdown]
# ## 3. Figures, one by one
#
# Each function returns a `plotly.graph_objects.Figure`; change its layout, show it, or write it as plotly can.

# %%
figures: dict[str, go.Figure] = {
    "activation": activation_heatmap(report.activations, profile.model.id),
    "load": load_by_layer(report.loads),
    "correlation": correlation_heatmap(report.correlation),
    "periodic": periodic_bars(report.periodic),
    "periodic_pairs": periodic_boxes(report.periodic),
    "routers": router_cosine_heatmap(report.router_similarity),
    "router_norms": router_norm_heatmap(report.router_similarity),
    "tokens": activation_surface(report.sample),
}
figures["correlation"].update_layout(title="My own title")

# %% [markdown]
# ## 4. One domain
#
# `activations` cuts a domain out of a profile; all statistics take what it returns.

# %%
domain = max(profile.domains, key=lambda name: activations(profile, name)["frequency"].tokens)
alone = activations(profile, domain)["frequency"]
correlation = layer_correlation(alone, delta_max=8)
figures["activation_of_a_domain"] = activation_heatmap([alone], domain)
for pattern in periodic_patterns(correlation, [3, 4, 5]).patterns:
    print(f"{domain}: Δ = {pattern.delta}, mean r = {pattern.mean:+.2f} ({pattern.strength})")

# %% [markdown]
# ## 5. Two domains, and every domain against the rest
#
# Two domains of one profile are two activations. `within_run` says how far halves of the prompts lie apart, so that a
# distance can be held against the noise. `moescope.compare` does all of it for whole profiles, or by domain.

# %%
if len(profile.domains) > 1:
    other = next(name for name in profile.domains if name != domain)
    within = {
        name: within_run(profile.split_counts[:, profile.domains.index(name)], profile.model.experts)
        for name in (domain, other)
    }
    pair = compare_activations(alone, activations(profile, other)["frequency"], within[domain], within[other], top=3)
    distance = pair.between.jensen_shannon  # bits, one a layer
    print(
        f"{other} against {domain}: {np.nanmean(distance):.3f} bits, noise {np.nanmean(pair.noise.jensen_shannon):.3f}"
    )
    for move in pair.moved:
        print(f"  layer {move.layer} expert {move.expert}: {move.before:.1%} → {move.after:.1%}")

    by_domain = moescope.compare([profile], ["demo"], by_domain=True)
    figures["difference_by_domain"] = difference_heatmap(by_domain.pairs, by_domain.subject)
    moescope.write_comparison(by_domain, options.out / "by_domain")

# %% [markdown]
# ## 6. The weights
#
# A pass over the files of a checkpoint; no model is loaded. `weigh` sums, `analyze_weights` says what the sums mean:
# here for the layers 4 apart alone. With `against="./base"` both are about what has changed since.

# %%
record = moescope.weigh("demo:stacked", deltas=[4], folder=options.out / "weights")
weights = moescope.analyze_weights(record)
print(verdict_in_words(weights))
if isinstance(weights, WeightSimilarity):
    (apart,) = weights.by_distance
    print(f"the same expert {apart.delta} layers on: cosine {apart.mean:+.3f}, over {apart.num_pairs} pairs of layers")
    figures["expert_layers"] = expert_layer_heatmap(weights)
moescope.write_weights(weights, options.out / "weights")

# %%
(options.out / "figures").mkdir(parents=True, exist_ok=True)
for name, figure in figures.items():
    figure.write_html(options.out / "figures" / f"{name}.html", include_plotlyjs="directory")

# %% [markdown]
# ## 7. Tables
#
# Rows of plain Python values, with a description of each column; `moescope.export` writes the same as csv, parquet or
# xlsx.

# %%
experts = next(table for table in tables(profile, report) if table.name == "experts")
names = [column.name for column in experts.columns]
busiest = sorted((dict(zip(names, row, strict=True)) for row in experts.records()), key=lambda row: -row["selections"])
for row in busiest[:3]:
    print({name: row[name] for name in ("layer", "expert", "selections", "selection_frequency")})

moescope.export(profile, options.out / "tables", "csv", force=True)
with open(options.out / "tables" / "experts.csv", encoding="utf-8", newline="") as file:
    assert sum(int(row["selections"]) for row in csv.DictReader(file)) == profile.selection_counts.sum()

# %% [markdown]
# ## 8. The report
#
# What `moescope profile` writes: one page, the figures, the summary, the structured data.

# %%
profile.save(str(options.out / "profile.safetensors"))
for file in moescope.write_report(report, options.out / "report"):
    print(file)
