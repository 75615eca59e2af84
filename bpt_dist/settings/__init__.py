"""The parts of `bpt_dist.config`: models, rules over several keys, strict YAML, command-line overrides, method options."""
