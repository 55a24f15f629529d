"""moescope: which experts does a Mixture-of-Experts model use, where, and is there a pattern to it?

The public names are imported when they are first used, so that `import moescope` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.adapters.session import profile as profile
    from moescope.adapters.transformers_record import record as record
    from moescope.adapters.weighing import weigh as weigh
    from moescope.profiler.errors import MoescopeError as MoescopeError
    from moescope.profiler.profile import RoutingProfile as RoutingProfile
    from moescope.profiler.profile import merge as merge
    from moescope.profiler.run import Interrupted as Interrupted
    from moescope.profiler.trace import Trace as Trace
    from moescope.profiler.trace_sums import sum_trace as sum_trace
    from moescope.profiler.trace_writer import TraceOptions as TraceOptions
    from moescope.viz.analysis import analyze as analyze
    from moescope.viz.comparison_data import compare as compare
    from moescope.viz.comparison_report import write_comparison as write_comparison
    from moescope.viz.export import export as export
    from moescope.viz.report import write_report as write_report
    from moescope.viz.trace_analysis import analyze_trace as analyze_trace
    from moescope.viz.trace_report import write_trace_analysis as write_trace_analysis
    from moescope.viz.trace_view import view_trace as view_trace
    from moescope.viz.trace_view_page import write_trace_view as write_trace_view
    from moescope.viz.weight_analysis import analyze_weights as analyze_weights
    from moescope.viz.weights_report import write_weights as write_weights

__version__ = "0.1.0"

_PUBLIC = {
    "Interrupted": "moescope.profiler.run",
    "MoescopeError": "moescope.profiler.errors",
    "RoutingProfile": "moescope.profiler.profile",
    "Trace": "moescope.profiler.trace",
    "TraceOptions": "moescope.profiler.trace_writer",
    "analyze": "moescope.viz.analysis",
    "analyze_trace": "moescope.viz.trace_analysis",
    "analyze_weights": "moescope.viz.weight_analysis",
    "compare": "moescope.viz.comparison_data",
    "export": "moescope.viz.export",
    "merge": "moescope.profiler.profile",
    "profile": "moescope.adapters.session",
    "record": "moescope.adapters.transformers_record",
    "sum_trace": "moescope.profiler.trace_sums",
    "view_trace": "moescope.viz.trace_view",
    "weigh": "moescope.adapters.weighing",
    "write_comparison": "moescope.viz.comparison_report",
    "write_report": "moescope.viz.report",
    "write_trace_analysis": "moescope.viz.trace_report",
    "write_trace_view": "moescope.viz.trace_view_page",
    "write_weights": "moescope.viz.weights_report",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'moescope' has no attribute {name!r}")
