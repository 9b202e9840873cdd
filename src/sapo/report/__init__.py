"""Run directories to figures: one self-contained HTML page (`page`), or PNG and PDF for a paper (`images`).

`assemble.make_report` reads runs and makes everything that is shown, as data; page and images draw the same data.
"""

from sapo.report.assemble import RunReport, make_report
from sapo.report.page import write_page

__all__ = ["RunReport", "make_report", "write_page"]
