# `make sandbox` shows a run of the tool; `make test` runs the quick tests, `make test-all` all of them.
# `make test PYTHON=python3.12` does it with another Python, in an environment of its own.

PYTHON := python3
ifeq ($(PYTHON),python3)
ENVIRONMENT := .venv
else
ENVIRONMENT := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
RUN := $(ENVIRONMENT)/bin/python
PYTEST := $(RUN) -m pytest -n 2 --dist worksteal
DOCUMENTED_RUN := --dataset-directory dataset-composite_0123/validation \
	--model-id segmentation-model-composite_0123_20200321T154533Z --batch-size 16 \
	--optimizing-class-metric iou_score --dataset-downsample-factor 0.1

.PHONY: sandbox test test-slow test-all lint bucket clean

sandbox: bucket
	$(RUN) train_segmentation_model_prediction_thresholds.py --gcp-bucket sandbox $(DOCUMENTED_RUN)

test: bucket lint
	$(PYTEST) -m "not slow"

test-slow: bucket lint
	$(PYTEST) -m slow

test-all: bucket lint
	$(PYTEST)

lint: $(ENVIRONMENT)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bucket: $(ENVIRONMENT)/installed
	$(RUN) tests/build_sandbox.py

$(ENVIRONMENT)/installed: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv $(ENVIRONMENT)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-* sandbox tmp
