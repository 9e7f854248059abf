"""The runtime type checker that the tests put under every function of av_lens: an int is a float, as PEP 484 says."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
