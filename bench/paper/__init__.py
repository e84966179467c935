"""Every table of the paper, on its models and data or on what can be had without a hub: docs/paper.md.

worlds.py   a model and a task with their settings, out of the YAML files beside it
sources.py  where models and data come from: a hub, or packages
cells.py    what a table consists of, and one cell's run: `fedpft simulate`
shown.py    tables and drawings of what has been run, beside the paper's figures
"""
