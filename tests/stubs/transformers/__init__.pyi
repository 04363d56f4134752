# What type checkers know of transformers' index of names: nothing. It imports several hundred models,
# which took pyright a third of its time. What tests take from its submodules is checked as ever.
from typing import Any

def __getattr__(name: str) -> Any: ...
