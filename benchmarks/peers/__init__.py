"""One file per peer: the same tasks, each written as that library's documentation shows it.

A `Peer` wraps a module and has the methods of `hooks.Peer`, whose docstrings say what each must return.
`every_layer`: its sweeps cover every layer of a deep model; the others leave out two of three.
`in_place`: it changes the user's module, so that the plain forward needs another copy.
"""
