"""The RunPod worker that serves a model from the store. `python -m handler` starts it."""
