"""transformers: greedy `generate` of the whole row at once, SDPA attention."""
# pyright: reportMissingImports=false

import time
from typing import Any

from tests.bench.peers.drivers.turn import Engine, Job, Tokens, take_turn

# Its third form, batched_mm, copies both matrices of every token's experts: 90 GB in one of these prefills.
EXPERT_FORMS = ("eager", "grouped_mm")
# By how many standard deviations of a step's logits the best token leads where every engine must find it: bfloat16
# summed up in other orders, and routers that choose otherwise for it, have turned leads of up to a third.
SAFE_MARGIN = 0.4


class Transformers(Engine):
    """For prefill and decode each with the faster form of its experts."""

    packages = ("transformers", "torch")

    def __init__(self, job: Job) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            job.checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._forms = EXPERT_FORMS[0], EXPERT_FORMS[0]

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        """Prompts are all as long, so there is no padding."""
        out = self._prefill(prompts)
        sequences = self._decode(out, new_tokens - 1).sequences if new_tokens > 1 else out.sequences
        return sequences[:, len(prompts[0]) :].tolist()

    def warm_up(self, prompts: Tokens, new_tokens: int) -> dict[str, Any]:
        """Choose the forms, and tell how long each answer is certain enough for any engine to give the same."""
        prefill_s, step_s = dict[str, float](), dict[str, float]()
        form = ""
        for form in EXPERT_FORMS:
            self._forms = form, form
            start_s = time.perf_counter()
            out = self._prefill(prompts)
            prefill_s[form] = time.perf_counter() - start_s
            if new_tokens > 1:
                out = self._decode(out, 1)
                start_s = time.perf_counter()
                self._decode(out, 1)
                step_s[form] = time.perf_counter() - start_s
        self._forms = min(prefill_s, key=prefill_s.__getitem__), min(step_s, key=step_s.__getitem__, default=form)
        return {"forms": self._forms, "safe": self._safe(prompts, new_tokens)}

    def _safe(self, prompts: Tokens, new_tokens: int) -> list[int]:
        """Tokens of each answer before the first that leads by less than `SAFE_MARGIN`."""
        out = self._prefill(prompts)
        steps = list(out.logits)
        if new_tokens > 1:
            steps += self._decode(out, new_tokens - 1).logits
        lengths = [0] * len(prompts)
        for number, logits_TV in enumerate(steps):
            best = logits_TV.float().topk(2).values
            leads = (best[:, 0] - best[:, 1]) / logits_TV.float().std(-1)
            for index, lead in enumerate(leads.tolist()):
                lengths[index] += int(lengths[index] == number and lead >= SAFE_MARGIN)
        return lengths

    def _prefill(self, prompts: Tokens) -> Any:
        import torch

        return self._run(self._forms[0], torch.tensor(prompts), 1)

    def _decode(self, before: Any, new_tokens: int) -> Any:
        """Go on with what came before, whose cache is used up by it."""
        cache = before.past_key_values
        return self._run(self._forms[1], before.sequences, new_tokens, past_key_values=cache)

    def _run(self, form: str, tokens: Any, new_tokens: int, **options: Any) -> Any:
        import torch

        self._model.set_experts_implementation(form)
        mask = torch.ones_like(tokens)
        options |= {"return_dict_in_generate": True, "output_logits": True}
        with torch.inference_mode():
            return self._model.generate(
                tokens, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, attention_mask=mask, **options
            )


if __name__ == "__main__":
    take_turn(Transformers)
