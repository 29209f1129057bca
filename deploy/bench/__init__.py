"""The latency benchmark: subjects timed side by side in one run, and the report about it.

subject.py   what is timed                    measure.py   the rounds
case.py      batch size and task mix          summary.py   raw samples -> statistics
machine.py   where it ran                     cautions.py  what to doubt about the numbers
report.py    everything in one record, and its JSON (schema.json)
wording.py   numbers and sentences as people read them, the verdict among them
reading.py   a written report, read again
table.py     on the terminal                  page.py      one HTML page (charts.py, page.html)

Counted or measured beside the rounds, subject by subject (furnish.py): source.py (how an engine is opened again), work.py
(what its graph has to do), footprint.py (memory in a process of its own, taken.py), nodes.py and parts.py (where the time
goes). Of the machine: ceilings.py (its best), state.py (before and after). On the page each is a view (views.py, drawing.py):
roofline.py, size_view.py, node_view.py, trends.py.

Two reports beside each other: alike.py (may they be compared), contrast.py (statistics of two runs), compare.py
(a verdict per case), compare_views.py (terminal, Markdown).
"""
