"""The backends, one module or package each; interface.py says what a backend is."""
