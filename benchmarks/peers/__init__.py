"""One file per peer: the same tasks, each written as that library's documentation shows it.

A `Peer` wraps a module and has the methods of `hooks.Peer`, whose docstrings say what each must return.
`every_layer`: its sweeps cover every layer of a deep model; without it six layers are run and stand for all.
`in_place`: it changes the user's module, so that the plain forward needs another copy.
"""
