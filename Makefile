# make demo   sets everything up and runs the main job
# make test   sets everything up and runs the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# A sourced ROS 2 is used where there is one; where not, the real rclpy comes from PyPI (extra "ros").
ROS := $(shell $(PYTHON) -c "import rclpy" 2>/dev/null && echo yes)
ifeq ($(ROS),yes)
VENV_FLAGS := --system-site-packages
EXTRAS := test
else
EXTRAS := test,ros
endif

.PHONY: setup demo test lint clean
setup: $(VENV)/.installed

$(VENV)/.installed: setup.py setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

demo: setup
	$(BIN)/imatching demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build install log
