# make demo: the main job on real input, end to end.   make test: all tests.   Both set up what they need.
PYTHON ?= python3
VENV := .venv
TRITON := .venv-triton
CONSTRAINTS := requirements/constraints.txt
JOBS ?= 2

.PHONY: demo test check bench setup clean

setup: $(VENV)/.ready

demo: $(VENV)/.ready $(TRITON)/.ready
	$(VENV)/bin/python examples/digits/demo.py --triton-env $(TRITON)

test: $(VENV)/.ready $(TRITON)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python
	OMP_NUM_THREADS=1 UTUNE_TRITON_ENV=$(TRITON) $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile

bench: $(VENV)/.ready
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH bench/report.sh

clean:
	rm -rf $(VENV) $(TRITON) runs

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]' torchvision
	touch $@

# Real Triton comes as a Linux wheel and wants numpy below 2, so it lives in an environment of its own.
# Where there is no wheel for this Python, the environment stays empty, and demo and tests leave it out.
WHEELS := $(shell $(PYTHON) -c 'import platform, sys; print(platform.system() == "Linux" and (3, 11) <= sys.version_info < (3, 13))')
$(TRITON)/.ready: requirements/triton.txt
	$(PYTHON) -m venv $(TRITON)
ifeq ($(WHEELS),True)
	$(TRITON)/bin/pip install --quiet --disable-pip-version-check -r $<
else
	@echo "no Triton here (it needs Linux and Python 3.11 or 3.12): serve --engine embedded answers the same"
endif
	touch $@
