"""The latency benchmark: subjects timed side by side in one run, and the report about it.

subject.py   what is timed                    measure.py   the rounds
case.py      batch size and task mix          summary.py   raw samples -> statistics
machine.py   where it ran                     cautions.py  what to doubt about the numbers
report.py    everything in one record, and its JSON (schema.json)
wording.py   numbers and sentences as people read them, the verdict among them
reading.py   a written report, read again
table.py     on the terminal                  page.py      one HTML page (charts.py, page.html)

Two reports beside each other: alike.py (may they be compared), contrast.py (statistics of two runs), compare.py
(a verdict per case), compare_views.py (terminal, Markdown).
"""
