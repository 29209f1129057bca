"""Triton's HTTP fuzz test with so many cases for each of its addresses: `short_fuzz.py CASES`, beside fuzztest.py.

With all of them, two minutes were not enough for the first of 20 addresses, and its log had 700 MB by then.
"""

import runpy
import sys

import boofuzz

CASES = int(sys.argv[1])


class Short(boofuzz.Session):
    def __init__(self, *args, **settings):
        super().__init__(*args, index_end=CASES, web_port=None, **settings)


boofuzz.Session = Short
sys.argv = ["fuzztest.py"]
runpy.run_path("fuzztest.py", run_name="__main__")
