"""A small Mixtral trained on public-domain English, with prompts to continue.

`MODEL_DIR` is a Hugging Face checkpoint folder, `PROMPTS` an OpenAI batch file. See README.md.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
PROMPTS = Path(__file__).parent / "prompts.jsonl"
