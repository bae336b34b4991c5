"""Parts of `model_steps.py`: the models, their low-bit forms, and a run of several in turns."""
