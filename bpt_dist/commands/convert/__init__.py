"""`bpt-dist convert`: from a GGUF file to the safetensors folder that every backbone is loaded from."""
