"""A deterministic simulation of the failover cores: one seed, one run, the same for ever."""
