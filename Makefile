# Every target sets up what it needs first; nothing is installed twice (see scripts/setup.sh).
#   PYTHON=python3.12 make test    picks the interpreter
#   VENV=/tmp/elsewhere make test  puts the environment somewhere else

VENV ?= .venv
export VENV
# Activated, not called by path: nbgrader runs `alembic` and `jupyter` from PATH.
RUN := . "$(VENV)/bin/activate" &&
LAB_ARGS ?=
# torch's OpenMP threads spin while they wait for each other. Beside any other load that is ruinous
# (measured, PGD on the MNIST CNN, 2 threads on 2 busy cores: 214 passes a second, 10,087 without); a little
# spinning keeps most of the speed of a quiet machine (18,000 passes a second of 22,000).
export GOMP_SPINCOUNT ?= 1000

# Files of tests share the processors, one process and one thread of torch each: small networks gain nothing
# from a second thread.
PARALLEL := OMP_NUM_THREADS=1
IN_FILES := -n logical --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint notebooks redteam mutate zoo lab bench container sbom clean distclean

help: ## list these targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: ## create the environment, or bring it up to date; no-op when nothing changed
	@sh scripts/setup.sh

demo: setup ## grade a class of example submissions to lesson 1, from build to class report
	$(RUN) python -m grading demo

# pytest comes last, so that its summary is the last line of a green run.
test: setup lint notebooks ## everything that CI runs: lint, types, course build, notebooks, all tests
	$(RUN) $(PARALLEL) python -m pytest $(IN_FILES) -m "not redteam"

check: setup lint ## the quick half of test: lint, types, course build, fast tests
	$(RUN) $(PARALLEL) python -m pytest $(IN_FILES) -m "not slow and not browser and not redteam"

lint: setup ## ruff, mypy, and that course/ is what solutions/ generates
	$(RUN) python -m ruff check
	$(RUN) python -m ruff format --check
	$(RUN) python -m mypy
	$(RUN) python -m grading build --check

# A run of its own: in a notebook a third party's warning is output to look at, not an error.
notebooks: setup ## execute every solution notebook in the smoke tier
	$(RUN) $(PARALLEL) ROBUSTKIT_TIER=smoke python -m pytest $(IN_FILES) -W default --nbval-lax --nbval-current-env \
	    --nbval-cell-timeout=600 solutions

mutate: setup ## grade every mutant of every lesson's solution; resumes where it stopped; an hour; writes docs/mutants.md
	$(RUN) python -m grading mutate --jobs 2 --table docs/mutants.md

# A sample of the corpus is in `make test`; the whole takes about ten minutes.
redteam: setup ## every hostile submission of tests/redteam, in every sandbox tier; writes docs/redteam.md
	$(RUN) python -m pytest tests/redteam --table docs/redteam.md

ZOO_ARGS ?=
zoo: setup ## train, measure and ship the CIFAR-10 models on a GPU (ZOO_ARGS="--minutes 8": a chunk)
	$(RUN) python scripts/zoo.py $(ZOO_ARGS)

# nbgrader_config.py in this folder is what the nbgrader command and formgrader read.
lab: setup ## JupyterLab on the course, with nbgrader and formgrader (LAB_ARGS="--no-browser --port 8889")
	$(RUN) python -m jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/course $(LAB_ARGS)

# torchattacks and adv-lib ask for versions that the course cannot have: they lie beside the environment.
bench: setup ## time everybody's attacks against their bare passes; what grading, certifying and serving cost; the red team
	$(RUN) test -d "$$VIRTUAL_ENV/bench-peers/torchattacks" || pip install -q --no-deps \
	    --target "$$VIRTUAL_ENV/bench-peers" torchattacks==3.5.1 adv-lib==0.2.8 || \
	    echo "bench: without torchattacks and adv-lib" >&2
	$(RUN) python scripts/bench.py
	$(RUN) python -m scripts.bench_grading
	$(RUN) python scripts/bench_certify.py --images 10 > docs/bench/certify.json.part && \
	    mv docs/bench/certify.json.part docs/bench/certify.json
	$(RUN) $(PARALLEL) python scripts/bench_serve.py
	$(RUN) $(PARALLEL) python scripts/bench_redteam.py

# Needs root, podman, buildah, runc and debootstrap; installs none of them. About ten minutes on two cores.
container: setup ## build the service's image from nothing, run it as deploy/ does, and look at what it can do
	$(RUN) python scripts/container.py

sbom: setup ## write build/sbom.json, the bill of materials of the service
	$(RUN) python scripts/sbom.py

clean: ## remove caches, builds and the demo's output; runs/, grades and the environment stay
	rm -rf build dist demo screenshots .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -print0 | xargs -0 rm -rf

distclean: clean ## clean, and remove .venv too
	rm -rf .venv .setup-lock robustkit.egg-info
