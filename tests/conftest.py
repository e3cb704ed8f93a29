"""Settings of all tests: none fails for its time under hypothesis, of which a busy machine takes more."""
from hypothesis import settings

settings.register_profile("untimed", settings(), deadline=None)   # else as Hypothesis has it here, or under CI
settings.load_profile("untimed")
