"""The GPU check: what `launch/gpu_check.sh` runs. See `__main__.py`."""
