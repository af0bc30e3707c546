"""The runtime of a function: shim, worker, engine, HTTP."""
