"""hrm: a hierarchical roofline model of a machine, and the best offloading policy for it.

How the parts follow from one another, in the order of a plan:

- `hardware`, `machines`: a machine as memory levels with processors and links, loaded from YAML;
  `model_spec` and `workload`: what is run; `policy`: how it is run, in integers.
- `tasks`, `schedules`: a schedule turns a model and a policy into a task graph, inert data that
  `simulate` walks in virtual time and the `executor` package runs on real weights.
- `operators`, `roofline`, `costs`: FLOPs and bytes of every task, and its seconds on a machine;
  `memory`: bytes that a policy needs at each level, from which the executor allocates.
- `closed_form`, `estimate`: throughput of a policy as a bound and as a simulation; `search`: the
  policy whose throughput is highest; `policy_file`: where it is kept; `parallel`: several GPUs;
  `phase_work`, `causes`, `launches`: what the seconds are spent on, and which would save most.
- `scaling`, `analysis`: other machines and workloads, and what would be best there;
  `published`: what others measured, and what is predicted for it.
- `trace`, `validate`: what a run did, and how far the prediction was from it; `profiling`: where
  a machine's figures come from; `plots` and `cli`: what people see.

Importing hrm loads no torch, matplotlib or optuna; the parts that need them do so when called.
"""

from hrm.causes import Cause
from hrm.costs import Costs
from hrm.errors import HrmError
from hrm.estimate import Estimate, estimate
from hrm.formats import Format, Formats
from hrm.hardware import Figure, HardwareProfile, Link, MemoryLevel, Processor, Rate, Source
from hrm.layers import Layer
from hrm.machines import compose, load_profile, save_profile, with_memory
from hrm.memory import MemoryPlan, plan_memory
from hrm.model_spec import BUILT_IN_MODELS, Dimensions, ModelSpec, load_model
from hrm.phases import decode_work, prefill_work, simulate_work
from hrm.policy import Policy, ScheduleName
from hrm.policy_file import PolicyFile, load_policy_file, save_policy_file
from hrm.roofline import TurningPoints, attention_turning_points, ffn_turning_points
from hrm.run_record import read_run
from hrm.scaling import Resource, at_cost, resource_value, resources, scale, with_resource
from hrm.tasks import Act, Device, Lane, Phase, Task, TaskGraph, TaskId
from hrm.trace import Span, Trace, lane_chart, read_chrome_trace
from hrm.workload import WORKLOADS, Workload, named_workload

__all__ = [
    "BUILT_IN_MODELS",
    "WORKLOADS",
    "Act",
    "Cause",
    "Costs",
    "Device",
    "Dimensions",
    "Estimate",
    "Figure",
    "Format",
    "Formats",
    "HardwareProfile",
    "HrmError",
    "Lane",
    "Layer",
    "Link",
    "MemoryLevel",
    "MemoryPlan",
    "ModelSpec",
    "Phase",
    "Policy",
    "PolicyFile",
    "Processor",
    "Rate",
    "Resource",
    "ScheduleName",
    "Source",
    "Span",
    "Task",
    "TaskGraph",
    "TaskId",
    "Trace",
    "TurningPoints",
    "Workload",
    "at_cost",
    "attention_turning_points",
    "compose",
    "decode_work",
    "estimate",
    "ffn_turning_points",
    "lane_chart",
    "load_model",
    "load_policy_file",
    "load_profile",
    "named_workload",
    "plan_memory",
    "prefill_work",
    "read_chrome_trace",
    "read_run",
    "resource_value",
    "resources",
    "save_policy_file",
    "save_profile",
    "scale",
    "simulate_work",
    "with_memory",
    "with_resource",
]
