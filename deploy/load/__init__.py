"""Load on a running server: latency and throughput at rising concurrency or at rising rates, and the report about it.

step.py      what is driven: callers that wait, or requests that come when they are due
arrivals.py  when requests are due             target.py    what the server is asked for
rows.py      drawn or given rows
traffic.py   whole requests, a task for each row      answers.py   whether a reply is an answer
wire.py      how requests travel: http_wire.py, grpc_wire.py
drive.py     one step's requests, each with its times
changes.py   tasks that come and go meanwhile
numbers.py   times -> statistics, once          latency.py   percentiles of raw samples
statistics.py  what the server counted itself  saturation.py  up to which rate it holds
run.py       all of it, in order               report.py    everything in one record, and its JSON (schema.json)
reading.py   a written report, read again      cautions.py  what to doubt about the numbers
wording.py   sentences and facts as people read them
table.py     on the terminal                   page.py      one HTML page (charts.py, page.html)
perf_csv.py  the columns of perf_analyzer
"""
