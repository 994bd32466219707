"""Show how a training's blocks changed, as one HTML file with animated masks, curves and a table.

    from sparse_lightning.report import write_report

    write_report("outputs/run/pattern.history", "report.html")

`write_comparison` writes one that compares several trainings. The file needs neither a network nor
a server. The command is `sparse-lightning report`.
"""

from sparse_lightning.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
