"""Two processes of one group, and what they do for the tests: training and layers on DTensors.

A pair of processes is started once for a file, because that costs seconds, and is then given jobs: functions of this
module. What a job returns for each rank is compared in the test's own process.
"""

import contextlib
import copy
import dataclasses
import multiprocessing
import multiprocessing.connection
import pickle
import traceback
import warnings
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rnn_gpu
from rnn_gpu import settings

COUNT = 2  # processes
START_LIMIT, JOB_LIMIT = 240, 120  # seconds after which processes are killed

TIME, BATCH, INPUT, HIDDEN = 3, 4, 3, 6
STEPS = 3

# ---- Processes -------------------------------------------------------------------------------------------------------


def _serve(rank: int, backend: str, store: str, connection) -> None:
    """The body of a process: run jobs as they come, until it is killed."""
    torch.set_num_threads(1)
    torch.backends.cudnn.rnn.fp32_precision = "ieee"  # tf32 has its own tests
    if backend == "nccl":
        torch.cuda.set_device(rank)
    limit = timedelta(seconds=JOB_LIMIT)
    torch.distributed.init_process_group(backend, f"file://{store}", rank=rank, world_size=COUNT, timeout=limit)
    reply = "ready", None
    with contextlib.suppress(EOFError):  # the test's process has ended
        while True:
            # plain pickle: torch's own way through a connection shares memory, which ends with the process
            connection.send_bytes(pickle.dumps(reply))
            job, arguments = pickle.loads(connection.recv_bytes())
            try:
                reply = "done", job(*arguments)
            except Exception:
                reply = "failed", traceback.format_exc()


class Processes:
    """The processes of one group, within a context. `run` starts them where there are none, also after a failure has
    ended them.
    """

    def __init__(self, backend: str, folder):
        self.backend, self.folder, self.started, self.running = backend, folder, 0, []

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_) -> None:
        """Kill them: the destructor of a group over gloo was seen to hang where the group had been destroyed."""
        for process, connection in self.running:
            process.kill()
            process.join()
            connection.close()
        self.running = []

    def run(self, job, *arguments) -> list:
        """What `job(*arguments)` returns in each process, by rank; RuntimeError with the traceback of one that fails,
        or where they do not end in time.
        """
        if not self.running:
            self._start()
        for _, connection in self.running:
            connection.send_bytes(pickle.dumps((job, arguments)))
        return self._replies(JOB_LIMIT)

    def _start(self) -> None:
        self.started += 1
        context = multiprocessing.get_context("spawn")
        for rank in range(COUNT):
            ours, theirs = context.Pipe()
            arguments = rank, self.backend, str(self.folder / f"store{self.started}"), theirs
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.running.append((process, ours))
        self._replies(START_LIMIT)

    def _replies(self, limit: float) -> list:
        waiting = {connection: rank for rank, (_, connection) in enumerate(self.running)}
        replies = [None] * COUNT
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), limit)
            problem = None if ready else f"no answer from ranks {sorted(waiting.values())} in {limit} seconds"
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    state, replies[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    state, replies[rank] = "failed", "the process ended"
                if state == "failed":
                    problem = f"rank {rank}: {replies[rank]}"
            if problem:
                self.__exit__()  # the others may be waiting for the one that failed
                raise RuntimeError(problem)
        return replies


@contextlib.contextmanager
def on_backend(name: str):
    """`rnn_gpu.backend(name)`; programs exchange their state, small as the layers are."""
    with rnn_gpu.backend(name), settings.always_exchange():
        yield


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, on the CPU and apart from autograd; a tensor as it is."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().cpu().clone()


def together(found: dict[str, Tensor]) -> Tensor:
    """All results as one vector: for an error that is random, and small tensors too few to say how large it is."""
    return torch.cat([value.flatten() for value in found.values()])


# ---- Training --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Training:
    """A few steps of training. how: "one" process with the whole batch, or "one, in parts", one part after another; or
    a way for several processes, each with its part.
    """

    name: str
    how: str
    library: str = "rnn_gpu"
    backend: str = "torch"
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    max_programs: int | None = None

    def of(self, library: str) -> "Training":
        """The same with torch.nn's layers on their own kernels."""
        return dataclasses.replace(self, library=library, backend="torch")

    def alone(self, in_parts: bool = False) -> "Training":
        """The same steps in one process."""
        how = "one" + (", in parts" if in_parts else "") + (", unused parameters" if "unused" in self.how else "")
        return dataclasses.replace(self, how=how)


class Network(nn.Module):
    """A stacked bidirectional layer, one on top that a step may leave out, and a linear one."""

    def __init__(self, library: str, name: str, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        layer = getattr(rnn_gpu if library == "rnn_gpu" else nn, name)
        self.first = layer(INPUT, HIDDEN, num_layers=2, bidirectional=True)
        self.second = layer(2 * HIDDEN, 2 * HIDDEN)
        self.head = nn.Linear(2 * HIDDEN, 2)

    def forward(self, input: Tensor, with_second: bool = True) -> Tensor:
        """[T, B, I] -> [T, B, 2]."""
        output, _ = self.first(input)
        if with_second:
            output, _ = self.second(output)
        return self.head(output)


def network(training: Training, seed: int = 0) -> Network:
    """The model of a training, the same in every library and process."""
    return Network(training.library, training.name, seed).to(training.device, training.dtype)


def data(training: Training, rank: int | None = None) -> Tensor:
    """The batch [T, B, I], or the part of a rank."""
    input = torch.randn(TIME, BATCH, INPUT, generator=torch.Generator().manual_seed(1))
    input = input if rank is None else input.chunk(COUNT, 1)[rank]
    return input.to(training.device, training.dtype)


def sharded(model: Network, device: str, **options) -> Network:
    """The model under `fully_shard`, its layers in groups of their own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (COUNT,))
    for module in (model.first, model.second, model):
        fully_shard(module, mesh=mesh, **options)
    return model


def wrapped(training: Training, model: Network) -> nn.Module:
    """The model as `training.how` says."""
    how, compiled = training.how, lambda model: torch.compile(model, backend="aot_eager")
    if how.startswith("one"):
        return model
    if how in ("fsdp", "fsdp, weights moved"):
        return sharded(model, training.device)
    if how == "fsdp bfloat16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return sharded(model, training.device, mp_policy=policy)
    if how == "compiled, then fsdp":
        model.first.compile(backend="aot_eager")
        return sharded(model, training.device)
    if how == "compiled, then ddp":
        return DistributedDataParallel(compiled(model))
    if how == "ddp, then compiled":
        return compiled(DistributedDataParallel(model))
    options = {
        "ddp": {},
        "ddp, no_sync": {},
        "ddp, static graph": dict(static_graph=True),
        "ddp, unused parameters": dict(find_unused_parameters=True),
    }
    return DistributedDataParallel(model, **options[how])


@contextlib.contextmanager
def moving_weights():
    """`flatten_parameters` moves weights on the CPU too, as it does for cuDNN: into one new chunk of memory."""

    def flatten_parameters(layer) -> None:
        weights = layer._flat_weights
        if len(weights) != len(layer._flat_weights_names) or any(hasattr(w, "placements") for w in weights):
            return
        with torch.no_grad():
            parts = torch.cat([w.flatten() for w in weights]).split([w.numel() for w in weights])
            for weight, part in zip(weights, parts, strict=True):
                weight.set_(part.view_as(weight))

    before, nn.RNNBase.flatten_parameters = nn.RNNBase.flatten_parameters, flatten_parameters
    try:
        yield
    finally:
        nn.RNNBase.flatten_parameters = before


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)


def step(training: Training, model: nn.Module, optimizer, input: Tensor, number: int = 0) -> None:
    """One step of the optimizer. The loss is a mean, so that the mean over ranks is that of the whole batch."""
    parts = [input]
    if "no_sync" in training.how or "in parts" in training.how:
        parts = input.chunk(COUNT, 1)
    optimizer.zero_grad()
    for n, part in enumerate(parts):
        later = "no_sync" in training.how and n + 1 < len(parts)  # gradients are not summed over processes yet
        with model.no_sync() if later else contextlib.nullcontext():
            with_second = "unused" not in training.how or number % 2 == 0
            loss = model(part, with_second).pow(2).mean() / len(parts)
            loss.backward()
    optimizer.step()


def train(training: Training) -> dict[str, Tensor]:
    """Parameters after some steps, and the gradients of the last one."""
    torch._dynamo.reset()
    moved = moving_weights() if "weights moved" in training.how else contextlib.nullcontext()
    with on_backend(training.backend), rnn_gpu.max_programs(training.max_programs), moved:
        model = network(training)
        parallel = wrapped(training, model)
        optimizer = optimizer_of(parallel)
        input = data(training, None if training.how.startswith("one") else torch.distributed.get_rank())
        for number in range(STEPS):
            step(training, parallel, optimizer, input, number)
        rnn_gpu.check()
    if "compiled" in training.how:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    found = {name: whole(parameter) for name, parameter in model.named_parameters()}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"gradient of {name}": whole(gradient) for name, gradient in gradients.items()}


def replaced_late(training: Training) -> tuple[list[str], list[str]]:
    """`replace_rnns` and `restore_rnns` on models that are sharded: what they warn, the layers' classes after them."""
    texts, classes = [], []
    for library, swap in (("torch.nn", rnn_gpu.replace_rnns), ("rnn_gpu", rnn_gpu.restore_rnns)):
        model = sharded(Network(library, training.name), training.device)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            swap(model)
        texts += [str(warning.message) for warning in seen]
        classes.append(f"{type(model.first).__name__} of {type(model.first).__mro__[2].__module__}")
    return texts, classes


# ---- State dicts and checkpoints -------------------------------------------------------------------------------------


def checkpoints(training: Training, folder: str) -> dict:
    """Train a sharded model for a step, take its state whole and in parts, save it, and go on with it in two others:
    one loaded from the checkpoint, one made on the device "meta" and loaded from the whole state dict of rank 0.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as states

    everything = states.StateDictOptions(full_state_dict=True)
    from_rank_0 = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    rank = torch.distributed.get_rank()
    input = data(training, rank)
    with on_backend(training.backend):
        model = sharded(network(training), training.device)
        optimizer = optimizer_of(model)
        step(training, model, optimizer, input)
        parts, optimizer_parts = states.get_state_dict(model, optimizer)
        complete = states.get_model_state_dict(model, options=everything)
        complete = {name: value.cpu().clone() for name, value in complete.items()}
        dcp.save({"model": parts, "optimizer": optimizer_parts}, checkpoint_id=folder)
        found = {
            "whole": complete,
            "placements": {name: str(value.placements) for name, value in parts.items()},
            "rows": {name: value.to_local().shape[0] for name, value in parts.items()},
        }

        loaded = sharded(network(training, seed=1), training.device)
        its_optimizer = optimizer_of(loaded)
        state = dict(zip(("model", "optimizer"), states.get_state_dict(loaded, its_optimizer), strict=True))
        dcp.load(state, checkpoint_id=folder)
        states.set_state_dict(
            loaded, its_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )

        with torch.device("meta"):
            late = network(dataclasses.replace(training, device="meta"))
        late = sharded(late, training.device)
        late.to_empty(device=training.device)
        # a copy, because the dictionary is changed
        states.set_model_state_dict(late, dict(complete) if rank == 0 else {}, options=from_rank_0)
        found["late"] = {name: whole(value) for name, value in late.state_dict().items()}
        for layer in (late.first, late.second):
            layer.reset_parameters()
        found["reset"] = {name: whole(value) for name, value in late.state_dict().items()}

        for one, its in ((model, optimizer), (loaded, its_optimizer)):
            step(training, one, its, input)
    for name, one in (("continued", model), ("loaded", loaded)):
        found[name] = {key: whole(value) for key, value in one.state_dict().items()}
    return found


# ---- Layers on DTensors ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of a layer on DTensors. placements: one letter for each dimension of the mesh, "r" replicated or a
    dimension to shard; the mesh is (2,), or (2, 1) for two letters.
    """

    input: str
    states: str | None = None
    weights: str = "r"
    batch: int | None = BATCH
    batch_first: bool = False
    masked: bool = False


def given(case: Case, name: str, dtype: torch.dtype):
    """A layer for a case, its input, initial states, masks, and the gradients of its results."""
    torch.manual_seed(2)
    layer = getattr(rnn_gpu, name)(INPUT, HIDDEN, 2, bidirectional=True, batch_first=case.batch_first).to(dtype)
    rows = () if case.batch is None else (case.batch,)
    shape = (*rows, TIME) if case.batch_first else (TIME, *rows)
    draw = lambda *shape: torch.randn(shape).to(dtype)
    input = draw(*shape, INPUT)
    states = [draw(4, *rows, HIDDEN) for _ in range(2 if name == "LSTM" else 1)]
    masks = {}
    if case.masked:
        masks = dict(lengths=torch.randint(0, TIME + 1, rows), resets=torch.rand(shape) < 0.3)
    gradients = [draw(*shape, 2 * HIDDEN), *[draw(4, *rows, HIDDEN) for _ in states]]
    return layer, input, states if case.states else [], masks, gradients


def outcome(layer, input: Tensor, states: list[Tensor], masks: dict, gradients: list[Tensor]) -> dict[str, Tensor]:
    """The results of a call, and the gradients of everything; all may be DTensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in (input, *states)]
    hx = None if not states else leaves[1] if len(states) == 1 else tuple(leaves[1:])
    output, final = layer(leaves[0], hx, **masks)
    results = [output, *(final if isinstance(final, tuple) else (final,))]
    torch.autograd.backward(results, gradients)
    found = {f"result {n}": result for n, result in enumerate(results)}
    found |= {f"gradient of input {n}": leaf.grad for n, leaf in enumerate(leaves)}
    return found | {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}


def in_parts(case: Case, layer, input: Tensor, states: list[Tensor], masks: dict, gradients: list[Tensor]) -> dict:
    """`outcome` of the batch in as many parts as there are processes, one after another, put together."""
    dim = 0 if case.batch_first else 1
    chunks = lambda tensor, dim: tensor.chunk(COUNT, dim)
    lengths, resets = (chunks(masks[key], at) if masks else None for key, at in (("lengths", 0), ("resets", dim)))
    outcomes = []
    for n, part in enumerate(chunks(input, dim)):
        layer.zero_grad()
        own = dict(lengths=lengths[n], resets=resets[n]) if masks else {}
        d_output, *d_states = gradients
        d_parts = [chunks(d_output, dim)[n], *[chunks(one, 1)[n] for one in d_states]]
        outcomes.append(outcome(layer, part, [chunks(state, 1)[n] for state in states], own, d_parts))
    found = {}
    for key in outcomes[0]:
        values = [one[key] for one in outcomes]
        if key.startswith("gradient of") and "input" not in key:
            found[key] = sum(values[1:], values[0])
        else:
            found[key] = torch.cat(values, dim if key in ("result 0", "gradient of input 0") else 1)
    return found


def on_dtensors(
    case: Case, name: str, backend: str, dtype: torch.dtype, device: str = "cpu", compiled: bool = False
) -> tuple[dict, dict]:
    """The outcome of a case on DTensors: whole, and how each result is placed, in the letters of `Case`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    mesh = init_device_mesh(device, (COUNT, *[1] * (len(case.input) - 1)))

    def distributed(tensor: Tensor, placements: str) -> Tensor:
        placements = [Replicate() if letter == "r" else Shard(int(letter)) for letter in placements]
        return distribute_tensor(tensor.to(device), mesh, placements)

    def shard(_, module, mesh) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(distributed(parameter.detach(), case.weights)))

    everywhere = "r" * len(case.input)
    layer, input, states, masks, gradients = given(case, name, dtype)
    layer = distribute_module(layer.to(device), mesh, shard)
    if compiled:
        torch._dynamo.reset()
        layer.compile(backend="aot_eager", fullgraph=True)
    with on_backend(backend):
        found = outcome(
            layer,
            distributed(input, case.input),
            [distributed(state, case.states) for state in states],
            {name: distributed(mask, everywhere) for name, mask in masks.items()},
            [distributed(gradient, everywhere) for gradient in gradients],
        )
    return {key: whole(value) for key, value in found.items()}, {
        key: "".join("r" if p.is_replicate() else str(p.dim) if p.is_shard() else "?" for p in value.placements)
        for key, value in found.items()
    }


def mixed_up(name: str) -> dict[str, str]:
    """The errors of calls in which not everything is a DTensor on one mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_module

    def replicated(tensor: Tensor, mesh) -> DTensor:
        return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim)

    mesh, other = init_device_mesh("cpu", (COUNT,)), init_device_mesh("cpu", (COUNT, 1))
    layer, input, states, masks, _ = given(Case("r", "r", masked=True), name, torch.float32)
    plain, layer = copy.deepcopy(layer), distribute_module(layer, mesh)
    hx = tuple(states) if len(states) == 2 else states[0]
    here, there = replicated(input, mesh), replicated(input, other)
    found = {}
    for what, call in {
        "weights": lambda: plain(here),
        "hx": lambda: layer(here, hx),
        "lengths": lambda: layer(here, lengths=masks["lengths"]),
        "resets": lambda: layer(here, resets=masks["resets"]),
        "mesh": lambda: layer(there),
    }.items():
        try:
            call()
        except RuntimeError as error:
            found[what] = str(error)
    return found
