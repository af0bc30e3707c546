"""What serves a function: shim, worker, engine, HTTP."""
