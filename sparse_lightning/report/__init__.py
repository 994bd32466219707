"""What became of a training's blocks, as one HTML file: films of the masks, curves, a table.

    from sparse_lightning.report import write_report

    write_report("outputs/run/pattern.history", "report.html")

The file needs no network and no server. The command is `sparse-lightning report`.
"""

from sparse_lightning.report.page import write_report
from sparse_lightning.report.story import tell

__all__ = ["tell", "write_report"]
