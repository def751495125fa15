"""
`armt serve`: the server of transformers, with conversations that keep their memory.

Each file has one idea: `sessions` keeps what conversations left behind, `remembering` lets a model go on from it,
`protocol` says what a request may ask for, `connections` knows clients, bounds what they send and notices when one is
gone, `server` puts them into the server of transformers.
"""
