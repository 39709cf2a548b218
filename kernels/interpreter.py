"""Triton's interpreter (`TRITON_INTERPRET=1`) with concurrent programs and honest arithmetic.

    with concurrent_programs(seed=3):
        kernel[grid](...)

Triton's interpreter runs the programs of a grid one after another, so a program that waits for data of
another one waits for ever. Within this context every program of a launch gets a thread, and there is one
baton: only its holder runs. A program hands the baton on at each polling load (`tl.load(..., volatile=True)`)
to a program drawn by a seeded generator, so that a schedule can be replayed and many can be tried.

What else the interpreter does not do as the hardware does is mended in the same context:

* bfloat16, which the interpreter keeps as bare uint16: products, sums, comparisons and conversions work on
  the values, and conversion to bfloat16 rounds to nearest even (the interpreter truncates);
* `tl.dot(..., input_precision="tf32")`, Triton's default, ignores the low 13 bits of float32 operands as the
  tensor cores do; "ieee" is full float32; "tf32x3", "bf16x3" and "bf16x6" are taken as full float32 too;
* 16-bit products are summed in float32;
* inline assembly runs, as far as `_PTX` knows its instructions; its loads are polls.

Not imitated: the order of summation, the errors of the approximate `ex2` and `rcp` (both are rounded correctly here,
and do not flush what is smaller than a normal number), and a memory model (a store is seen by all at once, and in
order; only `torn=True` changes that).

Nothing of Triton's code is copied: its methods are wrapped while a context is open, and put back afterwards.
Tried with the versions of spec.TRITON_VERSIONS. Importing this module loads neither numpy nor the interpreter.
"""

import contextlib
import dataclasses
import dis
import functools
import inspect
import itertools
import math
import random
import re
import threading

import triton

np = tl = interpreter = None  # numpy, triton.language, triton.runtime.interpreter: loaded by the first entry

_here = threading.local()  # .programs, .number and .index of the program that runs in this thread
_mutex = threading.Lock()  # guards the three names below
_depth = 0  # contexts that are open
_settings = None  # those of the outermost context
_undo = None  # an ExitStack that takes the wrappers off again
_one_launch = threading.RLock()  # the interpreter's state is global: launches of two threads go one by one


def interpreting():
    """Whether kernels decorated from now on run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


@contextlib.contextmanager
def concurrent_programs(seed=0, torn=False, leave_out=()):
    """Run the programs of interpreted launches concurrently within this context.

    seed: draws the schedules: successive launches in one context get different ones, the same ones each time.
    torn: every store lands in two random parts, with changes of program between them, and later stores of
        the same program may overtake the second part: hardware orders none of them. Without it a reader
        passes that tests only some of the words it waits for, or only a flag that was stored last.
    leave_out: programs that never run, so that a wait that cannot end can be tested: a collection of indices
        (x, y, z), or a function of the kernel's name and the index that says whether to leave a program out.

    Contexts nest: the outermost rules, inner ones change nothing. So a launcher can enter it around each
    launch, and a test that wants another schedule enters it before. Where Triton does not interpret, a bare
    context does nothing.
    """
    global _depth, _settings, _undo
    if not interpreting():
        if torn or leave_out:
            raise RuntimeError("torn stores and left-out programs need TRITON_INTERPRET=1")
        yield
        return
    with _mutex:
        if _depth == 0:
            _load()
            _settings = _Settings(seed, torn, leave_out)
            _undo = _wrap_interpreter()
        _depth += 1
    try:
        yield
    finally:
        with _mutex:
            _depth -= 1
            if _depth == 0:
                _undo.close()
                _settings = _undo = None


def _load():
    global np, tl, interpreter
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter


# Programs ---------------------------------------------------------------------------------------------------


class _Settings:
    """What the outermost context asked for, and its generator, which goes on from launch to launch."""

    def __init__(self, seed, torn, leave_out):
        self.torn = torn
        self.random = random.Random(seed)
        self.description = f"seed={seed}, torn={torn}"
        if callable(leave_out):
            self.leaves_out = leave_out
        else:
            left_out = {(*index, 0, 0)[:3] for index in leave_out}
            self.leaves_out = lambda name, index: index in left_out

    def part(self, shape):
        """A mask of a part of a tile, a regular one: every second number, the last rows, or all but those.

        Drawn number by number it would hardly ever be the part that a given mistake overlooks.
        """
        numbers = np.arange(math.prod(shape))
        draw = self.random
        part = np.full(numbers.shape, True)
        while True:
            bit = draw.randrange(max(1, (len(numbers) - 1).bit_length()))
            part &= (numbers >> bit) & 1 == draw.randrange(2)
            if draw.random() < 0.5:
                return (part ^ (draw.random() < 0.5)).reshape(shape)


class _Stopped(BaseException):
    """Unwinds a program because another one failed. Not an Exception: the interpreter would wrap those."""


class _Programs:
    """Stands in for a kernel's Python function: collects the programs of a launch, then runs them all.

    The launch stays Triton's own: its loop over the grid calls this object once a program, which only notes
    the index; the call for the last program runs them.
    """

    def __init__(self, function, settings):
        self.function, self.settings = function, settings
        # What the executor reads of a kernel's function:
        self.__signature__ = inspect.signature(function)
        self.__annotations__ = function.__annotations__
        self.__globals__ = function.__globals__
        self.__name__ = function.__name__
        self.indices = []
        self.patched = set()  # modules whose functions this launch has called: see _wrap_patch_language
        self.error = None
        self.stores = 0  # that have landed, of all programs

    def __call__(self, *args, **kwargs):
        builder = interpreter.interpreter_builder
        if not self.settings.leaves_out(self.__name__, builder.grid_idx):
            self.indices.append(builder.grid_idx)
        if builder.grid_idx != tuple(n - 1 for n in builder.grid_dim) or not self.indices:
            return
        self.alive = list(range(len(self.indices)))
        self.seen = [-1 for _ in self.alive]  # stores landed when it last had the baton
        self.under_way = [[] for _ in self.alive]  # stores begun: (the places they write, what lands them)
        self.turn = [threading.Lock() for _ in self.alive]  # a program waits for its own, the baton frees it
        threads = [threading.Thread(target=self._run, args=(n, args, kwargs)) for n in self.alive]
        for turn in self.turn:
            turn.acquire()
        for thread in threads:
            thread.daemon = True  # a program that loops without a poll must not keep the process alive
            thread.start()
        self.turn[self._following()].release()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # an interrupt from the keyboard: each program stops at its next turn
            self.error = self.error or error
            for thread in threads:
                thread.join()
        if self.error is not None:
            raise self.error

    def _run(self, number, args, kwargs):
        """The body of a program's thread."""
        self.turn[number].acquire()
        _here.programs, _here.number, _here.index = self, number, self.indices[number]
        try:
            if self.error is None:
                with np.errstate(all="ignore"):  # hardware does not warn
                    self.function(*args, **kwargs)
                    self.settle()
        except _Stopped:
            pass
        except BaseException as error:  # handed to the launching thread
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"in program {_here.index} of {self.__name__} ({self.settings.description})")
            self.error = self.error or error
        self.alive.remove(number)
        if self.alive:
            self.turn[self._following()].release()

    def _following(self):
        """The number of the program that runs next.

        Mostly one that can have news: to poll again where nobody has stored since is a waste of time. But
        only mostly, so that no order is impossible.
        """
        draw = self.settings.random
        news = [n for n in self.alive if self.seen[n] != self.stores]
        return draw.choice(news if news and draw.random() < 0.9 else self.alive)

    def hand_on(self):
        """Give the baton to some program, perhaps to the one that holds it, and wait until it comes back."""
        number = _here.number
        self.seen[number] = self.stores
        following = self._following()
        if following != number:
            self.turn[following].release()
            self.turn[number].acquire()
        if self.error is not None:
            raise _Stopped

    def postpone(self, places, land):
        """Let a part of a store of this program land later."""
        self.under_way[_here.number].append((places, land))

    def settle(self, places=None):
        """Wait until this program's stores have landed; given places, only if one of them writes there."""
        under_way = self.under_way[_here.number]
        if places is not None and not any(np.intersect1d(places, others).size for others, _ in under_way):
            return
        while under_way:
            self.hand_on()
            while self.settings.random.random() < 0.5:
                self.hand_on()
            _, land = under_way.pop(0)
            land()


def _programs_here():
    """The launch that this thread runs a program of, or None."""
    return getattr(_here, "programs", None)


# Wrappers: each takes the original and returns what stands in for it ----------------------------------------


def _argument(function, name):
    """A function that finds an argument in a call: its position differs between releases of Triton."""
    parameters = inspect.signature(function).parameters
    position = list(parameters).index(name)

    def find(args, kwargs):
        return args[position] if position < len(args) else kwargs[name]

    return find


def _wrap_masked_load(load):
    """A load without a mask comes here too, with a mask of ones."""
    is_volatile = _argument(load, "is_volatile")

    def masked_load(*args, **kwargs):
        programs = _programs_here()
        if programs is not None:
            programs.settle()  # a program sees its own stores
            if is_volatile(args, kwargs):
                programs.hand_on()
        return load(*args, **kwargs)

    return masked_load


def _wrap_masked_store(store):
    """Counts stores, and tears them if asked. A store without a mask comes here too, with a mask of ones."""

    def masked_store(self, ptrs, value, mask, *rest, **kwargs):
        programs = _programs_here()
        if programs is None:
            return store(self, ptrs, value, mask, *rest, **kwargs)

        def land(mask):
            programs.stores += 1
            store(self, ptrs, value, mask, *rest, **kwargs)

        if not programs.settings.torn:
            return land(mask)
        bits = np.asarray(mask.data, bool)  # which a scalar that was spread over a tile makes integers
        first = programs.settings.part(bits.shape)
        places = ptrs.data[bits] >> np.uint64(3)  # in units of 8 bytes, because stores differ in width
        programs.settle(places)  # of two stores to one place the later one stays
        land(interpreter.TensorHandle(bits & first, tl.int1))
        programs.postpone(places, lambda: land(interpreter.TensorHandle(bits & ~first, tl.int1)))
        if programs.settings.random.random() < 0.5:
            programs.settle()

    return masked_store


def _wrap_atomic(atomic):
    """An atomic operation may be a poll as well as a store, and orders the stores before it."""

    def wrapped(*args, **kwargs):
        programs = _programs_here()
        if programs is not None:
            programs.settle()
            programs.hand_on()
            programs.stores += 1
        return atomic(*args, **kwargs)

    return wrapped


def _wrap_executor_init(init):
    def executor_init(self, fn, *args, **kwargs):
        init(self, fn, *args, **kwargs)
        self.fn = _Programs(fn, _settings)

    return executor_init


def _wrap_executor_call(call):
    def executor_call(self, *args, **kwargs):
        with _one_launch:
            return call(self, *args, **kwargs)

    return executor_call


def _wrap_patch_language(patch):
    """The interpreter patches the language at each call of one jit function by another: once will do. And it refuses a
    function beside which nobody has imported the language, though it is the same for all.
    """

    def patch_language(function):
        programs = _programs_here()
        if programs is None:
            return patch(function)
        if id(function.__globals__) not in programs.patched:
            programs.patched.add(id(function.__globals__))
            if any(value is tl or value is tl.core for value in function.__globals__.values()):
                patch(function)

    return patch_language


def _wrap_patch_tensor(patch):
    """Triton 3.6 takes `int()` of a scalar, an array of one dimension: numpy 2.4 refuses that."""

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch_tensor


def _grid_idx():
    """The builder's attribute of that name, one for each thread."""

    def get(builder):
        return _here.index if _programs_here() is not None else builder.__dict__.get("grid_idx")

    def put(builder, index):
        builder.__dict__["grid_idx"] = index

    return property(get, put)


# Types: Triton makes them, and a tensor's shape of constants, anew at each operation: a quarter of its time


def _wrap_tensor_init(init):
    """What a tensor takes from its type is made once for each type."""

    def tensor_init(self, handle, type):
        made = vars(type).get("_of_tensors")
        if made is None:
            init(self, None, type)
            made = type._of_tensors = dict(vars(self))
        vars(self).update(made)
        self.handle = handle

    return tensor_init


def _wrap_np_dtype(np_dtype):
    """The answer, not a table at each call."""
    known = functools.cache(np_dtype)
    return lambda type: (np_dtype if type.scalar.is_ptr() else known)(type.scalar)


def _wrap_with_element_ty(with_element_ty):
    """The same block of another type is made once."""

    def remembered(self, element):
        if element.is_ptr():
            return with_element_ty(self, element)
        made = vars(self).setdefault("_with", {})
        if element not in made:
            made[element] = with_element_ty(self, element)
        return made[element]

    return remembered


# Arithmetic -------------------------------------------------------------------------------------------------


def _is_bfloat16(handle):
    """Whether it holds bfloat16, kept as uint16; booleans of a comparison may bear the operands' type."""
    return handle.data.dtype == np.uint16 and handle.dtype.scalar == tl.bfloat16


def _as_float32(handle):
    """The same values, those of bfloat16 in float32: exact, for the exponents are the same."""
    if not _is_bfloat16(handle):
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round_to_bfloat16(values):
    """A bfloat16 handle of the nearest values, ties to even; every NaN becomes 0x7FFF, as in hardware."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    nearest_even = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    data = np.where(np.isnan(values), np.uint32(0x7FFF), nearest_even).astype(np.uint16)
    return interpreter.TensorHandle(data, tl.bfloat16)


def _wrap_cast(cast):
    def honest_cast(self, src, dst_type):
        values = _as_float32(src)
        if dst_type.scalar == tl.bfloat16 and not _is_bfloat16(src):
            return _round_to_bfloat16(values.data)
        if dst_type.scalar == tl.float32 and _is_bfloat16(src):
            return values
        return cast(self, values, dst_type)

    return honest_cast


def _wrap_elementwise(apply):
    """Operations on bfloat16 work on the values and round; comparisons give booleans."""

    def honest_apply(self, *handles_and_operation):
        *handles, operation = handles_and_operation
        if not all(_is_bfloat16(handle) for handle in handles):
            return apply(self, *handles_and_operation)
        result = operation(*(_as_float32(handle).data for handle in handles))
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        return _round_to_bfloat16(result)

    return honest_apply


def _wrap_fma(fma):
    """A fused product and sum rounds once: the product of two float32 numbers is exact in float64."""

    def honest_fma(self, x, y, z):
        kind = z.dtype.scalar
        if kind not in (tl.bfloat16, tl.float16, tl.float32):
            return fma(self, x, y, z)
        x, y, z = (_as_float32(handle).data.astype(np.float64) for handle in (x, y, z))
        if kind == tl.bfloat16:
            return _round_to_bfloat16(x * y + z)
        return interpreter.TensorHandle((x * y + z).astype(interpreter._get_np_dtype(kind)), kind)

    return honest_fma


# Inline assembly: PTX, a text that each `pack` elements run ----------------------------------------------------


def _flushed(x):
    """`.ftz`: zero, of the same sign, in place of what is smaller than a normal number."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


# Instruction -> what it computes of arrays. Infinities and zeros come out as in hardware, without a warning.
_PTX = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "sub.s32": lambda a, b: a - b,
    "sub.u32": lambda a, b: a - b,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "or.pred": lambda a, b: a | b,
    "setp.eq.b32": lambda a, b: a == b,
    "setp.eq.s32": lambda a, b: a == b,
    "setp.ne.b32": lambda a, b: a != b,
    "setp.lt.s32": lambda a, b: a < b,
    "setp.lt.u32": lambda a, b: a.view(np.uint32) < b.view(np.uint32),
    "setp.gt.s32": lambda a, b: a > b,
    "rcp.approx.ftz.f32": lambda x: _flushed(np.float32(1) / _flushed(x)),
}


_clock = itertools.count(step=100)


@functools.cache
def _statements(assembly):
    """The statements of a PTX text, each (predicate, instruction, operands), and where its labels stand."""
    text = assembly.strip()
    if text.startswith("{"):
        text = text[1:-1]
    statements, labels = [], {}
    for statement in text.split(";"):
        statement = statement.strip()
        while label := re.match(r"(\w+):\s*", statement):
            labels[label[1]] = len(statements)
            statement = statement[label.end() :]
        if statement and not statement.startswith(".reg"):
            predicate, name, operands = re.fullmatch(r"(?:@(!?\w+)\s+)?(\S+)\s+(.*)", statement, re.DOTALL).groups()
            statements.append((predicate, name, re.findall(r"\{.*?\}|\[.*?\]|[^\s,]+", operands)))
    return statements, labels


class _Assembly:
    """A PTX text that many threads run: those that are furthest behind go on first."""

    def __init__(self, assembly, builder, registers, count):
        self.statements, self.labels = _statements(assembly)
        self.builder, self.registers, self.count = builder, registers, count

    def run(self):
        """Run all threads to the end of the text."""
        at = np.zeros(self.count, np.int64)
        while (here := at.min()) < len(self.statements):
            predicate, name, operands = self.statements[here]
            active = at == here
            at[active] += 1
            if predicate is not None:
                active &= self.registers[predicate.lstrip("!")] != predicate.startswith("!")
            if name == "bra":
                at[active] = self.labels[operands[0]]
            else:
                self.execute(name, operands, active)

    def execute(self, name, operands, active):
        """Any other statement, in the `active` threads."""
        if name.startswith(("ld.relaxed.", "ld.volatile.")):
            words = re.findall(r"[$\w]+", operands[0])
            places = self.address(operands[1])[:, None] + 4 * np.arange(len(words), dtype=np.uint64)
            every = np.broadcast_to(active[:, None], places.shape)
            places, every = interpreter.TensorHandle(places, tl.pointer_type(tl.int32)), self.mask(every)
            read = self.builder.create_masked_load(places, every, None, None, None, True).data
            for i, word in enumerate(words):
                self.put(word, read[:, i], active)
        elif name == "st.volatile.global.b32":
            place = interpreter.TensorHandle(self.address(operands[0]), tl.pointer_type(tl.int32))
            value = interpreter.TensorHandle(self.value(operands[1]), tl.int32)
            self.builder.create_masked_store(place, value, self.mask(active), None, None)
        elif name in _PTX:
            self.put(operands[0], _PTX[name](*map(self.value, operands[1:])), active)
        elif name != "prefetch.global.L2":
            raise NotImplementedError(f"inline assembly that this interpreter does not know: {name}")

    def value(self, operand):
        """What a register, or a number, holds in every thread."""
        if operand in self.registers:
            return self.registers[operand]
        if operand == "%clock":  # goes on whenever somebody looks
            return np.full(self.count, next(_clock) & 0xFFFFFFFF, np.uint32).view(np.int32)
        return np.full(self.count, int(operand, 0) & 0xFFFFFFFF, np.uint32).view(np.int32)

    def address(self, operand):
        """`[register+number]` in every thread."""
        register, _, offset = operand.strip("[]").partition("+")
        return self.registers[register] + np.uint64(int(offset or 0))

    def put(self, register, value, active):
        """Write a register of the `active` threads."""
        whole = active.all() or register not in self.registers
        self.registers[register] = value if whole else np.where(active, value, self.registers[register])

    def mask(self, bits):
        return interpreter.TensorHandle(np.ascontiguousarray(bits), tl.int1)


class _Results(tuple):
    """What `create_inline_asm` returns: results by number."""

    get_result = tuple.__getitem__


def _create_inline_asm(builder, asm, constraints, operands, types, is_pure, pack):
    """Operands and results are `pack` registers each: of elements that are neighbours here, of others in hardware."""
    arrays = np.broadcast_arrays(*(handle.data for handle in operands))
    parts = [part for array in arrays for part in array.reshape(-1, pack).T]
    given = {f"${len(types) * pack + i}": part for i, part in enumerate(parts)}
    run = _Assembly(asm, builder, given, len(parts[0]))
    with np.errstate(all="ignore"):
        run.run()
    results = []
    for i, kind in enumerate(types):
        parts = [run.registers[f"${i * pack + k}"] for k in range(pack)]
        results.append(interpreter.TensorHandle(np.stack(parts, 1).reshape(arrays[0].shape), kind.scalar))
    return _Results(results)


def _wrap_dot(dot):
    precision_of = _argument(dot, "input_precision")

    def operand(handle, precision):
        kind = handle.dtype.scalar
        if kind not in (tl.bfloat16, tl.float16, tl.float32):
            return handle
        # Contiguous and of one type, or numpy multiplies without BLAS.
        data = np.ascontiguousarray(_as_float32(handle).data, np.float32)
        if kind == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
            data = (data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def honest_dot(self, a, b, *rest, **kwargs):
        precision = precision_of((self, a, b, *rest), kwargs)
        return dot(self, operand(a, precision), operand(b, precision), *rest, **kwargs)

    return honest_dot


def _wrap_generic_reduce(reduce):
    """Reduces with a function of the user's by halving whole arrays: the interpreter goes number by number.

    Not with a function that branches: the branch would be taken for all numbers alike.
    """

    def reduce_by_halves(self, inputs):
        function = self.combine_fn.fn
        arrays = [tensor.handle.data for tensor in inputs]
        branches = any("JUMP" in step.opname for step in dis.get_instructions(function.__code__))
        if branches or any(n & (n - 1) for n in arrays[0].shape):
            return reduce(self, inputs)
        axes = tuple(range(arrays[0].ndim)) if self.axis is None else self.axis
        dtypes = [tensor.dtype for tensor in inputs]
        arrays = [array.reshape(-1) if self.axis is None else np.moveaxis(array, axes, 0) for array in arrays]
        while len(arrays[0]) > 1:
            half = len(arrays[0]) // 2
            lower = [self.to_tensor(array[:half], dtype) for array, dtype in zip(arrays, dtypes)]
            upper = [self.to_tensor(array[half:], dtype) for array, dtype in zip(arrays, dtypes)]
            result = function(*lower, *upper)
            result = result if isinstance(result, tuple) else (result,)
            if [tensor.dtype for tensor in result] != dtypes:
                raise TypeError(f"{self.combine_fn.__name__} makes another type of {dtypes}")
            arrays = [tensor.handle.data for tensor in result]
        arrays = [np.expand_dims(array[0], axes) if self.keep_dims else array[0] for array in arrays]
        return [self.to_tensor(array, dtype) for array, dtype in zip(arrays, dtypes)]

    return reduce_by_halves


def _wrap_sum(sum_of):
    """Triton sums bfloat16 in bfloat16, the interpreter its bits."""

    def honest_sum(self, tensor):
        return self.generic_reduce((tensor,))[0] if _is_bfloat16(tensor.handle) else sum_of(self, tensor)

    return honest_sum


# ------------------------------------------------------------------------------------------------------------


def _wrap_interpreter():
    """Put every wrapper in place; the ExitStack returned takes them off."""
    if interpreter.GridExecutor.__init__.__module__ != interpreter.__name__:
        raise RuntimeError("the interpreter is wrapped already: was this module imported under two names?")
    undo = contextlib.ExitStack()

    def put(owner, name, value):
        if name in vars(owner):
            undo.callback(setattr, owner, name, vars(owner)[name])
        else:
            undo.callback(delattr, owner, name)
        setattr(owner, name, value)

    def wrap(owner, name, wrapper):
        put(owner, name, wrapper(getattr(owner, name)))

    instance = interpreter.interpreter_builder
    builder = type(instance)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(undo.close)
        wrap(interpreter.GridExecutor, "__init__", _wrap_executor_init)
        wrap(interpreter.GridExecutor, "__call__", _wrap_executor_call)
        wrap(interpreter, "_patch_lang", _wrap_patch_language)
        wrap(interpreter, "_patch_lang_tensor", _wrap_patch_tensor)
        put(builder, "grid_idx", _grid_idx())
        wrap(builder, "create_masked_load", _wrap_masked_load)
        wrap(builder, "create_masked_store", _wrap_masked_store)
        wrap(builder, "create_atomic_rmw", _wrap_atomic)
        wrap(builder, "create_atomic_cas", _wrap_atomic)
        wrap(builder, "create_dot", _wrap_dot)
        wrap(builder, "create_fma", _wrap_fma)
        wrap(builder, "cast_impl", _wrap_cast)
        put(builder, "create_inline_asm", _create_inline_asm)
        for arity in ("unary_op", "binary_op", "ternary_op"):
            wrap(builder, arity, _wrap_elementwise)
        wrap(interpreter.ReduceOps, "generic_reduce", _wrap_generic_reduce)
        wrap(interpreter.ReduceOps, "sum", _wrap_sum)
        wrap(tl.tensor, "__init__", _wrap_tensor_init)
        wrap(tl.block_type, "with_element_ty", _wrap_with_element_ty)
        put(tl.block_type, "to_ir", lambda self, builder: self)  # an equal one
        wrap(interpreter, "_get_np_dtype", _wrap_np_dtype)
        if not hasattr(builder, "get_bf16"):  # a constant of that type
            put(builder, "get_bf16", lambda self, value: _round_to_bfloat16(np.array([value])))
        if not instance.options.debug:
            # Triton computes sums and products of integers again in 64 bits to look for overflow, which takes
            # a large part of the time of a launch; without `debug` it drops the finding.
            put(instance, "options", dataclasses.replace(instance.options, sanitize_overflow=False))
        on_failure.pop_all()
    return undo
