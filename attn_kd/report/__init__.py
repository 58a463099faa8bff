"""The report on a distillation: one HTML file to read, its figures as JSON, a table as text.

:func:`attn_kd.report.page.write_report` writes all three from
:class:`attn_kd.report.results.Results`.
"""
