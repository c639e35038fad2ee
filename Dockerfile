# ROS 2 Jazzy with the nodes and commands:
#   docker build -t imatching_ros .
#   docker run --rm -it --net=host --ipc=host -v "$PWD/runs:/ws/runs" imatching_ros \
#       ros2 launch imatching_ros imatching.launch.py image_topic:=/camera/image_raw
# With a GPU add --gpus all, and device:=cuda to the launch command. --build-arg PIP_EXTRA_INDEX_URL=...
# names another index to take torch from, such as one of CPU builds, which are gigabytes smaller.
FROM ros:jazzy-perception
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update \
    && apt-get install -y --no-install-recommends make python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /ws
COPY . src/imatching_ros
SHELL ["/bin/bash", "-c"]
RUN source /opt/ros/jazzy/setup.bash \
    && make -C src/imatching_ros ros-setup \
    && source src/imatching_ros/.venv/bin/activate \
    && python -m colcon build --packages-select imatching_ros
RUN printf '%s\n' \
    '#!/bin/bash' \
    'source /opt/ros/jazzy/setup.bash' \
    'source /ws/src/imatching_ros/.venv/bin/activate' \
    'source /ws/install/setup.bash' \
    'exec "$@"' > /entrypoint.sh && chmod +x /entrypoint.sh
ENTRYPOINT ["/entrypoint.sh"]
CMD ["imatching", "demo"]
