"""Pictures of machines, plans and runs, with matplotlib; it is imported when something is drawn.

Every function returns the figure, and writes PNG, SVG or PDF if it is given a path.
"""

from hrm.plots.pareto import plot_pareto
from hrm.plots.regions import plot_map
from hrm.plots.roofline import plot_roofline
from hrm.plots.sweep import plot_sweep
from hrm.plots.timeline import plot_timeline, window
from hrm.plots.what_if import plot_what_if

__all__ = ["plot_map", "plot_pareto", "plot_roofline", "plot_sweep", "plot_timeline", "plot_what_if", "window"]
