# `make sandbox` shows a run of the tool; `make test` runs the quick tests, `make test-all` all of them.

PYTHON := .venv/bin/python
DOCUMENTED_RUN := --dataset-directory dataset-composite_0123/validation \
	--model-id segmentation-model-composite_0123_20200321T154533Z --batch-size 16 \
	--optimizing-class-metric iou_score --dataset-downsample-factor 0.1

PYTEST := $(PYTHON) -m pytest -n 2 --dist loadfile

.PHONY: sandbox test test-slow test-all lint bucket clean

sandbox: bucket
	$(PYTHON) train_segmentation_model_prediction_thresholds.py --gcp-bucket sandbox $(DOCUMENTED_RUN)

test: bucket lint
	$(PYTEST) -m "not slow"

test-slow: bucket lint
	$(PYTEST) -m slow

test-all: bucket lint
	$(PYTEST)

lint: .venv/installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bucket: .venv/installed
	$(PYTHON) tests/build_sandbox.py

.venv/installed: requirements.txt tests/requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv sandbox tmp
