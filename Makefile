# make demo        sets everything up and runs the main job
# make test        sets everything up and runs the tests
# make ros-setup   beside a sourced ROS 2: its numpy and OpenCV stay, and a torch that is there
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# A sourced ROS 2 is used where there is one; where not, the real rclpy comes from PyPI (extra "ros").
ROS := $(shell $(PYTHON) -c "import rclpy" 2>/dev/null && echo yes)

.PHONY: setup ros-setup demo test lint clean
ifeq ($(ROS),yes)
setup: ros-setup
else
setup: $(VENV)/.installed
endif
ros-setup: $(VENV)/.ros-installed

SOURCES := setup.py setup.cfg requirements.txt requirements-test.txt constraints.txt

$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,ros]"
	$(BIN)/python -m imatching_ros.kernels
	touch $@

# COLCON_IGNORE keeps colcon out of an environment that lies in a workspace.
$(VENV)/.ros-installed: $(SOURCES) ros_constraints.py
	$(PYTHON) -m venv --system-site-packages $(VENV)
	touch $(VENV)/COLCON_IGNORE
	$(BIN)/python ros_constraints.py > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -r requirements.txt -r requirements-test.txt
	$(BIN)/python -c "import cv2" || $(BIN)/python -m pip install -q -c $(VENV)/constraints.txt opencv-python-headless
	$(BIN)/python -m pip install -q --no-deps -e .
	$(BIN)/python -m imatching_ros.kernels
	touch $@

demo: setup
	$(BIN)/imatching demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build install log
