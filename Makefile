# make run | test | soak | interop | browser | bench | clean.  PYTHON names the interpreter: make test PYTHON=python3.9
# ARGS go to the command behind it: make test ARGS='-k push'.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV = .venv/$(VERSION)

# pip 20.3 runs on Python 3.9 to 3.11 only: the oldest at hand.
OLD_PYTHON ?= $(shell $(MAKE) -s --no-print-directory pythons | sed -n 's/^3\.\(09\|10\|11\) //p' | head -n 1)
CLIENTS = .interop/clients
PIP20 = .interop/pip20
DEVPI_SERVER = .interop/devpi-server
DEVPI_SERVER_7 = .interop/devpi-server-7
BROWSER = .interop/browser
# They run on Debian 12's Node.js 18; newer ones need a newer Node.js.
BROWSER_TOOLS = playwright-core@1.60.0 axe-core@4.14.1 html-validate@9.7.1
SPHINX = $(BROWSER)/sphinx

.PHONY: run test soak interop browser bench pythons clean

# Serves from the directory .data: make run ARGS='--port 4040'
run:
	$(PYTHON) devpi_lite.py --serverdir .data $(ARGS)

test: $(VENV)/complete
	$(VENV)/bin/python tests/in_parallel.py $(ARGS)

# The tests that play a crowd, kill commands and servers at random, or simulate faults, for much longer; each run other ones.
soak: export DEVPI_LITE_SOAK = 1
soak: export DEVPI_LITE_ROUNDS ?= 50
soak: export DEVPI_LITE_SEEDS ?= 2000
soak: $(VENV)/complete
	$(VENV)/bin/python -m pytest -q tests/test_coherence.py tests/test_replay.py tests/test_cut_off.py tests/test_backup.py \
	    tests/test_replica_faults.py tests/test_simulator.py $(ARGS)

# The last step marks the environment complete: one that was interrupted is made anew.
$(VENV)/complete:
	@test -n '$(VERSION)' || { echo '$(PYTHON) does not run: make test PYTHON=...' >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet pytest
	touch $@

# Real clients against a real server and the real PyPI, and our client against a real devpi-server, in environments made anew each time.
interop:
	@test -n '$(OLD_PYTHON)' || { echo 'pip 20.3 needs a Python 3.9, 3.10 or 3.11: make interop OLD_PYTHON=...' >&2; exit 1; }
	rm -rf .interop
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --upgrade pip
	$(CLIENTS)/bin/python -m pip install --quiet pytest uv twine devpi-client tox sphinx cmarkgfm
	$(PYTHON) -m venv $(DEVPI_SERVER)
	$(DEVPI_SERVER)/bin/python -m pip install --quiet devpi-server devpi-tokens
	@if $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	    $(PYTHON) -m venv $(DEVPI_SERVER_7) && $(DEVPI_SERVER_7)/bin/python -m pip install --quiet devpi-server==7.0.0b4; \
	    else echo 'devpi-server 7 needs Python 3.11: the tests with it are skipped' >&2; fi
	$(OLD_PYTHON) -m venv $(PIP20)
	$(PIP20)/bin/python -m pip install --quiet 'pip==20.3.*'
	@PATH="$$PATH:/usr/sbin"; command -v nginx >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq install -y nginx-light >/dev/null; } || \
	    echo 'nginx is not there and could not be installed: the tests behind it are skipped' >&2
	$(CLIENTS)/bin/python tests/in_parallel.py --folder tests/interop --workers 2 $(ARGS)

# Every page in Debian's Chromium, with tools from npm that look for barriers and faulty HTML; pictures are in .interop/shots.
# And what people do on them, the search of Sphinx's documentation, and hostile pages and texts.
# What is missing is said by the tests, which are skipped without it.
browser: $(VENV)/complete
	mkdir -p $(BROWSER)
	@lacking=; command -v chromium >/dev/null || lacking=chromium; command -v npm >/dev/null || lacking="$$lacking nodejs npm"; \
	    test -z "$$lacking" || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get -qq update && \
	    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq install -y --no-install-recommends $$lacking >/dev/null; } || true
	@npm install --prefix $(BROWSER) --ignore-scripts --no-audit --no-fund --loglevel=error $(BROWSER_TOOLS) || true
	@test -x $(SPHINX)/bin/sphinx-build || { $(PYTHON) -m venv $(SPHINX) && $(SPHINX)/bin/python -m pip install --quiet sphinx furo; } || true
	$(VENV)/bin/python tests/in_parallel.py --folder tests/browser --workers 2 $(ARGS)

# How fast it is, on this machine: make bench ARGS='--quick --workloads w1,w6'; --help says more.
bench:
	$(PYTHON) tests/bench/bench.py $(ARGS)

# Prints every CPython 3.9 to 3.15 at hand that can run the server and make environments, oldest
# first, a line each: 3.09 /path/to/python3. A name that pyenv knows but does not run prints nothing.
pythons:
	@for python in python3 python3.9 python3.10 python3.11 python3.12 python3.13 python3.14 python3.15 \
	        "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.*/bin/python; do \
	    "$$python" -c 'import os, sys, ssl, sqlite3, venv, ensurepip; \
	good = sys.implementation.name == "cpython" and (3, 9) <= sys.version_info[:2] <= (3, 15); \
	good and print("%d.%02d" % sys.version_info[:2], os.path.realpath(sys.executable))' </dev/null 2>/dev/null || true; \
	done | sort -u

clean:
	rm -rf --one-file-system .venv .interop .newest .newest.log .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
