"""What the use of experts says, in sentences and tables."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moescope.stats.coactivation import Coactivation
from moescope.stats.placement import HeldOutPlacement
from moescope.stats.specialisation import ALPHA, Specialisation
from moescope.stats.use import Coverage, ExpertUse, PhaseContrast
from moescope.viz.report_data import ExpertsUsed
from moescope.viz.wording import p_value

MOST_ROWS = 20

TableRows = tuple[str, Sequence[str], Sequence[Sequence[str | int]]]


def use_findings(used: ExpertsUsed) -> list[str]:
    """Sentences on evenness, domains, phases, pairs and placement; none where there is nothing to say."""
    found = [
        _evenness(used.use),
        _specialised(used.specialisation, used.domains) if used.specialisation is not None else "",
        _phases(used.phases),
        _together(used.coactivation) if used.coactivation is not None else "",
        _placed(used.placement) if used.placement is not None else "",
        _covered(used.coverage),
    ]
    return [sentence for sentence in found if sentence]


def _evenness(use: ExpertUse) -> str:
    middle = _median(use.effective)
    if not np.isfinite(middle):
        return ""
    hot = int(use.hot.sum())
    return (
        f"In the median layer use is spread as over {middle:.1f} equally used experts of "
        f"{int(np.median(use.experts))}; {hot:,} of {sum(use.experts):,} experts carry {use.hot_from:.0f} times the "
        "mean of their layer or more."
    )


def _specialised(found: Specialisation, domains: Sequence[str]) -> str:
    if not np.isfinite(found.p_corrected).any():
        return "Whether domains prefer experts cannot be told: the prompts fall into too few parts."
    tests = int(np.isfinite(found.p_corrected).sum())
    preferred = found.most_specialised(tests)
    if not preferred:
        return (
            f"No domain is shown to prefer an expert: {p_value(float(np.nanmin(found.p_corrected)))} for the clearest "
            f"of {tests:,} looks."
        )
    best = preferred[0]
    ratio = "and no other does" if np.isinf(best.ratio) else f"at {best.ratio:.1f} times the rate of the others"
    interval = f" (95% interval {best.low:.1f} to {best.high:.1f})" if np.isfinite(best.low) else ""
    bits = _median(found.information.corrected)
    known = f" Knowing the domain tells {max(bits, 0.0):.2f} bits about the expert in the median layer."
    return (
        f"In {len(preferred):,} of {tests:,} looks a domain prefers an expert, at {ALPHA:.0%} for any false alarm "
        f"among all looks; most clearly {domains[best.domain]} uses expert {best.expert} of layer {best.layer} {ratio}"
        f"{interval}.{known if np.isfinite(bits) else ''}"
    )


def _phases(found: PhaseContrast) -> str:
    middle, floor = _median(found.between.jensen_shannon), _median(found.floor)
    if not np.isfinite([middle, floor]).all():
        return ""
    times = f", {middle / floor:.1f} times what independent selections would give" if floor > 0 else ""
    return (
        f"Prefill and decode use experts {middle:.4f} bits apart in the median layer{times}. That is no test: tokens "
        "of a prompt are not independent."
    )


def _together(found: Coactivation) -> str:
    strongest = found.strongest(1)
    if not strongest:
        return ""
    pair = strongest[0]
    return (
        f"Chosen together most beyond chance: experts {pair.first} and {pair.second} of layer {pair.layer}, by "
        f"{pair.together:,} tokens where their popularity alone gives {pair.expected:,.0f}.{_clustered(found)} That is "
        "no test: prompts keep to their topics."
    )


def _clustered(found: Coactivation) -> str:
    middle, chance = _median(found.modularity), _median(found.chance_modularity)
    if not np.isfinite([middle, chance]).all():
        return ""
    return (
        f" Clusters of experts hold {middle:.1%} of a layer's pairs beyond chance in the median layer; of tokens that "
        f"choose independently, clusters found in the same way would hold {chance:.1%}."
    )


def _covered(found: Coverage) -> str:
    if not found.tokens:
        return ""
    few, experts = int(found.under.sum()), sum(found.experts)
    if not few:
        return f"Every expert was reached by {found.minimum} tokens or more."
    wanted = found.more_tokens[np.isfinite(found.more_tokens) & (found.short > 0)]
    never = int((found.under - (np.isfinite(found.more_tokens) & (found.short > 0)).sum(axis=1)).sum())
    enough = (
        f" About {found.tokens + wanted.max():,.0f} tokens of this kind would be enough"
        f"{f' for all but the {never:,} never chosen' if never else ''}."
        if wanted.size
        else " How many would be enough cannot be told: none of these was ever chosen."
    )
    return f"Fewer than {found.minimum} tokens reached {few:,} of {experts:,} experts.{enough}"


def _placed(found: HeldOutPlacement) -> str:
    in_order, greedy, doubled = (_median(each) for each in (found.contiguous, found.greedy, found.replicated))
    if not np.isfinite([in_order, greedy, doubled]).all():
        return ""
    return (
        f"On {found.gpus} GPUs with experts in order, the busiest carries {in_order:.2f} times the mean in the median "
        f"layer; placed by the load of half of the prompts it would carry {greedy:.2f} times on the other half, and "
        f"{doubled:.2f} with {found.redundant} experts doubled."
    )


def specialised_table(found: Specialisation, domains: Sequence[str]) -> TableRows | None:
    """The experts that a domain prefers most clearly; None without any."""
    rows = [
        (
            one.layer,
            one.expert,
            domains[one.domain],
            f"{one.share:.2%}",
            "only this domain" if np.isinf(one.ratio) else f"{one.ratio:.2f}",
            f"{one.low:.2f} to {one.high:.2f}" if np.isfinite(one.low) else "-",
            p_value(one.p_corrected),
        )
        for one in found.most_specialised(MOST_ROWS)
    ]
    columns = ("layer", "expert", "domain", "share", "× the others", "95% interval", "all looks")
    return ("Experts that a domain prefers most clearly", columns, rows) if rows else None


def together_table(found: Coactivation) -> TableRows | None:
    """The pairs of experts chosen together most beyond chance; None without any."""
    rows = [
        (pair.layer, pair.first, pair.second, pair.together, f"{pair.expected:,.1f}", f"{pair.lift:.2f}")
        for pair in found.strongest(MOST_ROWS)
    ]
    columns = ("layer", "expert", "and expert", "tokens", "by chance", "× chance")
    return ("Experts chosen together beyond chance", columns, rows) if rows else None


def _median(values: NDArray[np.float64]) -> float:
    """Median over what is finite; NaN without."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else float("nan")
