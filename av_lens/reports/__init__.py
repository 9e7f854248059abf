"""Findings as pages: `write_report` makes one self-contained page, `write_bundle` a folder with figures and numbers.

`write_comparison` makes the page of two checkpoints side by side.
"""

from av_lens.reports.comparison import write_comparison as write_comparison
from av_lens.reports.drawings import Calibration as Calibration
from av_lens.reports.page import write_bundle as write_bundle
from av_lens.reports.page import write_report as write_report
