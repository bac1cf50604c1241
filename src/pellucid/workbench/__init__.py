"""The workbench: a local web application in which a model is watched and changed while one types.

Only `pellucid workbench` starts it; it needs the extra `pellucid[workbench]`.
"""
