"""Back ends: implementations of `sirius_runtime.decoder.Backend`, which run a program's entries."""
