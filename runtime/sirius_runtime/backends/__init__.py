"""Back ends: what runs a program's entries behind `sirius_runtime.decoder.Backend`."""
