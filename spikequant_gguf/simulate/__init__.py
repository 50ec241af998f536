"""The arithmetic of the spiking layers in torch, for other bit widths than the runtime's and for studies.

At W4A4, with the weights of an SPK4 file, integer potentials equal the runtime's. Importing this needs torch
and transformers; `require_packages` says so in one sentence if they are missing.

    from spikequant_gguf.simulate.model import load_model

    model = load_model("model-SPK4.gguf")
    logits = model.logits(tokens, first=256)
"""
