"""RunPod's Hub looks for a file of this name; the worker is `python -m handler`, which the Dockerfile runs."""

import runpy

runpy.run_module("handler", run_name="__main__")
