"""`hrm search` and `hrm estimate`: find a policy, or predict a given one."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click

from hrm.cli.compare import Compared, Front, show_front, show_machines
from hrm.cli.console import console
from hrm.cli.options import (
    ChosenModel,
    MachineChoice,
    machine_options,
    machines_options,
    model_options,
    model_options_of_several,
    workload_options,
)
from hrm.cli.out_file import OUT_FILE
from hrm.cli.report import plan_json, print_json, print_plan
from hrm.cli.tables import csv_option, plot_option
from hrm.cli.texts import run_text
from hrm.cli.waiting import limits_options
from hrm.errors import PolicyError
from hrm.estimate import Estimate
from hrm.estimate import estimate as predict
from hrm.hardware import HardwareProfile
from hrm.latency import LatencyLimits
from hrm.memory import plan_memory
from hrm.model_spec import ModelSpec
from hrm.policy import Policy, ScheduleName, experts_of_layers, kv_tokens_for, prefix_tokens_for
from hrm.policy_file import policy_file_of, save_policy_file
from hrm.search import SOLVERS, SearchResult, Solver, Space, solver_named
from hrm.search import search as best_policy
from hrm.tasks import Device
from hrm.workload import Workload

_device = click.Choice([device.value for device in Device])
_schedule = click.option(
    "--schedule",
    type=click.Choice([name.value for name in ScheduleName]),
    default="cgopipe",
    show_default=True,
    help="The order in which tasks are issued.",
)
_staging = click.option("--staging", is_flag=True, help="Host weights are in pageable memory, staged through pinned.")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
_out = click.option("--out", type=OUT_FILE, help="Write the policy file here.")


@click.command()
@machines_options
@model_options_of_several
@workload_options
@limits_options
@_schedule
@_staging
@click.option("--attention", type=_device, help="Only policies with attention there.")
@click.option("--ffn", type=_device, help="Only policies with the experts there.")
@click.option(
    "--solver",
    type=click.Choice(list(SOLVERS)),
    default="exhaustive",
    show_default=True,
    help="exhaustive; milp solves mixed-integer programs; optuna tries the simulation.",
)
@click.option("--trials", type=click.IntRange(1), help="Of optuna [default: 200].")
@click.option(
    "--storage",
    metavar="FILE-or-URL",
    help="Keep optuna's trials here, to go on later and share them: a file, or sqlite:///FILE.",
)
@click.option("--seed", type=int, help="Of optuna [default: 0].")
@click.option(
    "--pareto",
    type=click.Choice([front.value for front in Front]),
    help="What throughput costs in host memory, in time to the last answer, or in GPUs.",
)
@_json
@_out
@csv_option
@plot_option
def search(
    model: ChosenModel,
    dtype: str | None,
    choice: MachineChoice,
    workload: Workload,
    limits: LatencyLimits,
    schedule: str,
    staging: bool,
    attention: str | None,
    ffn: str | None,
    solver: str,
    trials: int | None,
    storage: str | None,
    seed: int | None,
    pareto: str | None,
    as_json: bool,
    out: Path | None,
    csv: Path | None,
    plot: Path | None,
) -> None:
    """Find the policy with the highest job throughput that fits every memory level.

    Of policies that are as fast to a thousandth, it is the one with the smallest batch.
    With several machines (--gpus 1xT4,4xT4,1xL4) they are compared in one table.
    """
    of_solver = {"trials": trials, "storage": storage, "seed": seed}
    chosen = solver_named(solver, **{name: value for name, value in of_solver.items() if value is not None})
    spaces = [
        Space(
            model.spec,
            profile,
            workload,
            dtype=dtype or profile.default_dtype,
            schedule=ScheduleName(schedule),
            staging=staging,
            attention=Device(attention) if attention else None,
            ffn=Device(ffn) if ffn else None,
            limits=limits,
        )
        for profile in choice.machines()
    ]
    if pareto is not None or len(spaces) > 1:
        if solver != "exhaustive" or out is not None:
            raise PolicyError(
                "--solver and --out",
                f"<{'--pareto' if pareto else 'several machines'}>",
                "are for one search",
                "leave them out, or name one machine without --pareto",
            )
        compared = Compared(choice, spaces)
        if pareto is None:
            show_machines(compared, as_json=as_json, csv=csv, plot=plot)
        else:
            show_front(Front(pareto), compared, as_json=as_json, csv=csv, plot=plot)
        return
    if csv is not None or plot is not None:
        raise PolicyError(
            "--csv" if csv else "--plot",
            str(csv or plot),
            "goes with --pareto, and --csv with several machines",
            "leave it out; hrm plot draws",
        )
    (space,) = spaces
    with _trials_bar(chosen) as shown:
        result = best_policy(space, shown)
    _show(result.require(), model, space.profile, workload, result, as_json=as_json, out=out)


@contextmanager
def _trials_bar(solver: Solver) -> Generator[Solver]:
    """The solver with a progress bar on standard error, if it tries one policy after the other."""
    if solver.name != "optuna":
        yield solver
        return
    from rich.console import Console
    from rich.progress import Progress

    from hrm.search.bayesian import Optuna

    assert isinstance(solver, Optuna)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task("trials", total=solver.trials)

        def advance(number: int, best: float) -> None:
            bar.update(shown, completed=number, description=f"best {best:.4g} tokens/s")

        yield replace(solver, progress=advance)


@click.command()
@machine_options
@model_options
@workload_options
@limits_options
@click.option("--micro-batch-size", "-u", type=int, required=True, help="Requests a micro-batch.")
@click.option("--num-micro-batches", "-n", type=int, required=True, help="Micro-batches a batch.")
@click.option("--attention", type=_device, default="cpu", show_default=True)
@click.option("--ffn", type=_device, default="gpu", show_default=True)
@click.option(
    "--resident-experts",
    default="0",
    show_default=True,
    metavar="COUNT[,COUNT…]",
    help="Experts of every layer that stay on the GPU: one count, or one for each layer. Layers "
    "without experts have none.",
)
@click.option(
    "--resident-dense/--stream-dense",
    default=True,
    show_default=True,
    help="Whether projections, norms and routers stay on the GPU.",
)
@click.option(
    "--kv-on-gpu",
    is_flag=False,
    flag_value="1",
    default="0",
    show_default=True,
    metavar="[SHARE]",
    help="Share of the KV cache that lives on the GPU; all without a number.",
)
@click.option("--prefill-chunk", type=int, help="Prompt tokens prefilled at a time; longer prompts are split.")
@_schedule
@_staging
@_json
@_out
def estimate(
    model: ChosenModel,
    dtype: str,
    profile: HardwareProfile,
    workload: Workload,
    limits: LatencyLimits,
    micro_batch_size: int,
    num_micro_batches: int,
    attention: str,
    ffn: str,
    resident_experts: str,
    resident_dense: bool,
    kv_on_gpu: str,
    prefill_chunk: int | None,
    schedule: str,
    staging: bool,
    as_json: bool,
    out: Path | None,
) -> None:
    """Predict what one given policy will do.

    A policy that does not fit, or that misses a limit on waiting times, is refused with what would
    be enough.
    """
    for flag, value in (("--micro-batch-size", micro_batch_size), ("--num-micro-batches", num_micro_batches)):
        if value < 1:
            raise PolicyError(flag, value, "must be at least 1", "give a positive number")
    spec = model.spec
    if profile.has_accelerator:
        residents, on_gpu = _resident_experts(resident_experts, spec), _share(kv_on_gpu)
    else:  # one level: everything lies and is computed there
        attention = ffn = Device.GPU.value
        residents, resident_dense, on_gpu = experts_of_layers(spec), True, 1.0

    def given(sizes: Sizes) -> Policy:
        """The policy of the options, with other sizes."""
        batch_size = sizes.micro_batch_size * sizes.num_micro_batches
        if workload.num_requests is not None:
            batch_size = max(min(batch_size, workload.num_requests), sizes.micro_batch_size)
        numbers = -(-batch_size // sizes.micro_batch_size)
        longest = workload.max_prompt_len
        chunk = max(longest, min(round(batch_size * workload.prompt_len), 4096))
        chunk = chunk if prefill_chunk is None else prefill_chunk
        kv_numbers = round(on_gpu * numbers)
        cpu_attention = attention == Device.CPU and kv_numbers < numbers
        return Policy(
            schedule=ScheduleName(schedule),
            batch_size=batch_size,
            micro_batch_size=sizes.micro_batch_size,
            attention=Device(attention),
            ffn=Device(ffn),
            resident_experts=sizes.residents,
            resident_dense=resident_dense,
            gpu_kv_micro_batches=kv_numbers,
            kv_tokens_per_micro_batch=kv_tokens_for(
                sizes.micro_batch_size, workload.mean_context_len, workload.max_context_len
            ),
            prefill_chunk_tokens=chunk,
            prefix_buffer_tokens=prefix_tokens_for(spec, longest, chunk, cpu_attention=int(cpu_attention)),
            staging=staging,
            dtype=dtype,
        )

    sizes = Sizes(micro_batch_size, num_micro_batches, residents)
    policy = given(sizes)
    policy.check_model(spec)
    plan = plan_memory(spec, policy, profile)
    if not plan.fits:
        plan.check_fits(remedy=_smaller(sizes, lambda s: plan_memory(spec, given(s), profile).fits, profile))
    predicted = predict(spec, policy, profile, workload)
    limits.check(predicted.latency)
    _show(predicted, model, profile, workload, None, as_json=as_json, out=out)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a given policy is made smaller if it does not fit."""

    micro_batch_size: int
    num_micro_batches: int
    residents: tuple[int, ...]


def _smaller(sizes: Sizes, fits: Callable[[Sizes], bool], profile: HardwareProfile) -> str:
    """The options of the largest batch that fits, in smaller or fewer micro-batches; or empty.

    Resident experts are given up only if nothing fits beside them.
    """
    kept = [(sizes, "")]
    if profile.has_accelerator and any(sizes.residents):
        none = replace(sizes, residents=(0,) * len(sizes.residents))
        kept.append((none, " --resident-experts 0"))
    for changed, options in kept:
        size = _largest(changed.micro_batch_size, lambda u, of=changed: fits(replace(of, micro_batch_size=u)))
        number = _largest(changed.num_micro_batches, lambda n, of=changed: fits(replace(of, num_micro_batches=n)))
        if size == changed.micro_batch_size:
            return options.strip()
        if number * sizes.micro_batch_size > size * sizes.num_micro_batches:
            return f"-n {number}{options}"
        if size:
            return f"-u {size}{options}"
    least = replace(kept[-1][0], num_micro_batches=1)
    size = _largest(sizes.micro_batch_size, lambda u: fits(replace(least, micro_batch_size=u)))
    return f"-u {size} -n 1{kept[-1][1]}" if size else ""


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits if all smaller ones do; 0 if 1 does not."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _resident_experts(text: str, spec: ModelSpec) -> tuple[int, ...]:
    """Resident experts of every layer; one count is that of every layer which has experts."""
    there_are = experts_of_layers(spec)
    remedy = f"give one count, or one for each of the {spec.num_layers} layers"
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PolicyError("--resident-experts", text, "must be integers separated by commas", remedy) from None
    if len(counts) == 1 and 0 <= counts[0] <= spec.num_experts:
        return tuple(min(counts[0], most) for most in there_are)
    if len(counts) != spec.num_layers or not 0 <= min(counts) <= max(counts) <= spec.num_experts:
        rule = f"must be counts of at most the {spec.num_experts} experts of {spec.name}"
        raise PolicyError("--resident-experts", text, rule, remedy)
    for layer, (count, most) in enumerate(zip(counts, there_are, strict=True)):
        if count > most:
            raise PolicyError(
                f"--resident-experts of layer {layer}",
                count,
                "the layer has no experts",
                f"give 0 for the first {spec.num_dense_layers} layers",
            )
    return counts


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise PolicyError("--kv-on-gpu", text, "must be a share between 0 and 1", "give 0.5, or no number for all")
    return share


def _show(
    predicted: Estimate,
    model: ChosenModel,
    profile: HardwareProfile,
    workload: Workload,
    result: SearchResult | None,
    *,
    as_json: bool,
    out: Path | None,
) -> None:
    if out is not None:
        save_policy_file(out, policy_file_of(predicted, model.spec, profile, workload))
    if as_json:
        print_json(plan_json(predicted, model.spec, profile, workload, result))
        return
    print_plan(predicted, model.spec, profile, workload, result)
    console.print(f"\n{run_text(model.argument, out, spec=model.spec, profile=profile)}")
