# make demo: the main job on real input, end to end.   make test: all tests.   Both set up what they need.
PYTHON ?= python3
VENV := .venv
TRITON := .venv-triton
CONSTRAINTS := requirements/constraints.txt

.PHONY: demo test check bench setup clean

setup: $(VENV)/.ready

demo: $(VENV)/.ready $(TRITON)/.ready
	$(VENV)/bin/python examples/digits/demo.py --triton-env $(TRITON)

test: $(VENV)/.ready $(TRITON)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python
	UTUNE_TRITON_ENV=$(TRITON) $(VENV)/bin/python -m pytest

bench: $(VENV)/.ready
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH bench/vit_b.sh

clean:
	rm -rf $(VENV) $(TRITON) runs

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]' torchvision
	touch $@

# Real Triton comes as a Linux wheel and wants numpy below 2, so it lives in an environment of its own.
# Where there is no wheel, the environment stays empty, and demo and tests say that they leave it out.
$(TRITON)/.ready: requirements/triton.txt
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/pip install --quiet --disable-pip-version-check -r $< \
	  || echo "no Triton wheel for this platform: serve --engine embedded answers the same"
	touch $@
