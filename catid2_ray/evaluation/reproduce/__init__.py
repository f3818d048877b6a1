"""The CAT-ID² paper's tables and figures as a protocol for any catalogue: conditions, measures, significance, verdicts, report.

Pure logic on lists, arrays and rows; `on_ray/reproduce` makes the rankings, and `published.json` holds what the paper prints.
"""
