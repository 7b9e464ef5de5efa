"""Settings that suit a model, one TOML file an alias, in the names of the ``optimize`` options."""
