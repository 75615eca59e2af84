"""The backbone on this rank: whole, ZeRO-3 or FSDP2."""
