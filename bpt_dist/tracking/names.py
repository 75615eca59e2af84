"""How MLflow's page shows a run: its colour, the row of a table it belongs to, and short names for the axes of its charts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

# Colours that stay apart, in the order in which they are given: neighbours must not share one.
COLORS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D00", "#595959", 
    "#7B3FA0", "#3B7A57", "#B22222", "#1F9E9E", "#F06595", "#2F4F8F", "#9AA500", "#B98B5E",
)  # fmt: skip
ROW, SWEPT, COLOR = "bpt.row", "bpt.swept", "mlflow.runColor"


def color_of(row: str, others: Sequence[Mapping[str, str]]) -> str:
    """Return the colour of a new run, given the tags of the runs before it: that of its row, or the next one for a new row."""
    known = {tags[ROW]: tags[COLOR] for tags in others if ROW in tags and COLOR in tags}
    return known.get(row) or COLORS[len(known) % len(COLORS)]


def log10_name(name: str) -> str | None:
    """Return the name of the logarithm that is logged beside a sigma, None for every other parameter."""
    head, dot, last = name.rpartition(".")
    return f"{head}{dot}log10_{last}" if last in ("sigma", "sigma_relative") else None


def axis_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the name of each searched key on an axis, of which MLflow shows some fifteen characters; sigma by its logarithm."""
    logged = {key: log10_name(key) or key for key in keys}
    short = {key: _short(name) for key, name in logged.items()}
    times = Counter(short.values())
    return {key: name if times[name] == 1 else logged[key] for key, name in short.items()}


def axes(swept: str, params: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters that a trial of a sweep over `swept` (keys with commas between them) has beside its configuration."""
    names = axis_names([key for key in swept.split(",") if key])
    return {name: params[logged] for key, name in names.items() if (logged := log10_name(key) or key) in params}


def _short(name: str) -> str:
    return name.rpartition(".")[2].replace("log10_", "log10 ").replace("_relative", "_rel")
