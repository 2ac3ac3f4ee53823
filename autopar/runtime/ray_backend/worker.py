"""The worker process of one stage: it loads its shipment and interprets its program, one call per step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autopar.core.program import Buffer
from autopar.core.timeline import Event

if TYPE_CHECKING:
    from autopar.core.program import Slot
    from autopar.runtime.fill import Fillers
    from autopar.runtime.inprocess import Sizes
    from autopar.runtime.interpreter import Interpreter
    from autopar.runtime.pool import Pool
    from autopar.runtime.ray_backend.shipment import Shipment
    from autopar.runtime.ray_backend.transport import TileTransport

Array = Any


@dataclass(frozen=True)
class Answer:
    """What became of a call.

    Attributes:
        value: what it returned.
        error: why it failed, in words. peer: because another worker did. silent: there was no answer.
    """

    value: Any = None
    error: str | None = None
    peer: bool = False
    silent: bool = False


@dataclass(frozen=True)
class Setting:
    """How a worker process is set up.

    Attributes:
        devices: how many it has; on a CPU they are emulated.
        platform: "cpu" or "cuda". secret: of the session.
        timeout: seconds a receive waits. cache: folder of compiled programs that the workers share.
    """

    stage: int
    devices: int
    platform: str
    secret: bytes = field(repr=False)
    timeout: float
    cache: str | None


@dataclass(frozen=True)
class Loaded:
    """One program of a worker: how its values are kept, its segments, its messages, its buffers."""

    slots: Mapping[int, Slot]
    functions: Mapping[str, Any]
    transport: TileTransport
    interpreter: Interpreter


class StageWorker:
    """A Ray actor. Its methods run one after another, and return an `Answer` rather than raise.

    It may run several programs that share state; `program` says which, 0 is the one it was started for.
    """

    def __init__(self, setting: Setting):
        if setting.platform == "cpu":
            count = f"--xla_force_host_platform_device_count={setting.devices}"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"  # the last one counts
        import jax
        import ray

        jax.config.update("jax_platforms", setting.platform)
        from autopar.runtime.cache import keep_compiled

        if setting.cache is not None:
            keep_compiled(setting.cache)
        from autopar.runtime.ray_backend.mailbox import Mailbox

        found = jax.devices()
        if len(found) < setting.devices:
            raise RuntimeError(f"{setting.devices} devices are needed, the worker sees {len(found)}")
        self._setting, self._devices = setting, found[: setting.devices]
        host = ray.util.get_node_ip_address()
        self._mailbox = Mailbox(host, f"stage {setting.stage}", setting.secret)
        self._addresses: Sequence[tuple[str, int]] = ()
        self._failed: Answer | None = None
        self._programs: dict[int, Loaded] = {}
        self._pool: Pool | None = None
        self._running = 0

    def address(self) -> tuple[tuple[str, int], int]:
        """Returns host and port of the mailbox, and the process id."""
        return self._mailbox.address, os.getpid()

    def setup(
        self,
        shipment: Shipment,
        program: int = 0,
        names: Mapping[Buffer, Buffer] | None = None,
        constants: Mapping[Buffer, Array] | None = None,
    ) -> Answer:
        """Compiles the shipment; gives the seconds that took.

        Args:
            names: state buffer → what program 0 calls it. constants: arrays only this program has.
        """
        return self._try(lambda: self._setup(shipment, program, names or {}, constants or {}))

    def connect(self, addresses: Sequence[tuple[str, int]]) -> Answer:
        """Tells where all stages' mailboxes are."""
        self._addresses = addresses
        for loaded in self._programs.values():
            loaded.transport.addresses = addresses
        return Answer()

    def load(self, arrays: Mapping[Buffer, Array], program: int = 0) -> Answer:
        """Puts arrays (numpy; of a typed PRNG key its data) into buffers."""
        return self._try(lambda: self._load(arrays, self._take(program)))

    def make(self, fillers: Fillers, program: int = 0) -> Answer:
        """Makes arrays in buffers: zeros, or each device's slice read here."""
        return self._try(lambda: self._make(fillers, self._take(program)))

    def step(
        self, number: int, feeds: Mapping[Buffer, Array], start: float | None = None, program: int = 0
    ) -> Answer:
        """Runs one step. start: `time.time()` from which its events are to be measured; gives them."""
        return self._try(lambda: self._step(number, feeds, start, self._take(program)))

    def fetch(self, buffers: Sequence[Buffer], program: int = 0, rows: Sequence[int] | None = None) -> Answer:
        """Gives numpy arrays (of a typed PRNG key its data), whole or these rows of them."""
        return self._try(lambda: [_host(x, rows) for x in self._take(program).interpreter.fetch(buffers)])

    def hlo(self, program: int = 0) -> Answer:
        """Gives segment → compiled text."""
        return self._try(
            lambda: {name: f.executable.as_text() for name, f in self._programs[program].functions.items()}
        )

    def sizes(self, program: int = 0) -> Answer:
        """Gives segment → the compiler's bytes."""
        return self._try(lambda: self._sizes(self._programs[program]))

    def memory(self) -> Answer:
        """Gives (bytes held on the fullest device, resident bytes of this process, the most there were)."""
        return self._try(self._memory)

    def close(self) -> None:
        """Says goodbye to the peers."""
        self._mailbox.close()

    # inside

    def _try(self, call: Callable[[], Any]) -> Answer:
        """What a call returns or why it failed; a failure is told to the peers, and is every later answer."""
        from autopar.runtime.ray_backend.mailbox import PeerFailed

        if self._failed is not None:
            return self._failed
        try:
            return Answer(call())
        except PeerFailed as error:
            self._failed = Answer(error=str(error), peer=True)
        except Exception as error:
            self._failed = Answer(error=self._words(error))
        peers = [a for s, a in enumerate(self._addresses) if s != self._setting.stage]
        self._mailbox.abort(peers, self._failed.error or "")
        for loaded in self._programs.values():
            loaded.interpreter.clear()
        return self._failed

    def _words(self, error: Exception) -> str:
        said = f"{type(error).__name__}: {str(error)[:500]}"
        if self._running not in self._programs:
            return said
        interpreter = self._programs[self._running].interpreter
        at, instructions = interpreter.at, interpreter.worker.instructions
        return f"{said} at {str(instructions[at])[:120]}" if at < len(instructions) else said

    def _take(self, program: int) -> Loaded:
        """The program, with what it shares in its registers."""
        assert self._pool is not None
        self._running, loaded = program, self._programs[program]
        self._pool.take(loaded.interpreter)
        return loaded

    def _setup(
        self,
        shipment: Shipment,
        program: int,
        names: Mapping[Buffer, Buffer],
        constants: Mapping[Buffer, Array],
    ) -> float:
        from autopar.runtime import layout
        from autopar.runtime.interpreter import Interpreter
        from autopar.runtime.pool import Pool
        from autopar.runtime.ray_backend.shipment import load
        from autopar.runtime.ray_backend.transport import TileTransport

        begun, stage = time.perf_counter(), self._setting.stage
        slots, meshes = shipment.slots[stage], shipment.meshes
        self._jmesh = layout.jax_mesh(meshes[stage], self._devices)
        functions = {blob.name: load(blob, self._jmesh) for blob in shipment.blobs}
        transport = TileTransport(
            stage, meshes, shipment.slots, self._jmesh, self._mailbox, self._setting.timeout
        )
        transport.addresses = self._addresses
        interpreter = Interpreter(
            shipment.worker, functions, transport, lambda buffer: self._sharding(slots, buffer)
        )
        loaded = self._programs[program] = Loaded(slots, functions, transport, interpreter)
        if self._pool is None:
            self._pool = Pool(interpreter)
        else:
            self._pool.join(interpreter, names)
        self._load(constants, loaded)
        return time.perf_counter() - begun

    def _sharding(self, slots: Mapping[int, Slot], buffer: Buffer) -> Any:
        from autopar.runtime import layout

        return layout.slot_sharding(self._jmesh, slots[buffer.value])

    def _load(self, arrays: Mapping[Buffer, Array], loaded: Loaded) -> None:
        loaded.interpreter.load({b: self._place(loaded.slots, b, x) for b, x in arrays.items()})

    def _make(self, fillers: Fillers, loaded: Loaded) -> None:
        from autopar.runtime.fill import Arena, fill

        arena = Arena()
        for buffer, read in fillers.items():
            slots = loaded.slots
            made = fill(slots[buffer.value], self._sharding(slots, buffer), read, arena)
            loaded.interpreter.load({buffer: made})

    def _place(self, slots: Mapping[int, Slot], buffer: Buffer, x: Array) -> Array:
        """A copy on the devices: what is donated later must not share memory with the message it came in."""
        import jax
        import numpy as np

        from autopar.runtime import layout
        from autopar.runtime.ray_backend.transport import wrap_key

        dtype, sharding = layout.as_dtype(slots[buffer.value].dtype), self._sharding(slots, buffer)
        if layout.is_key(dtype):
            return jax.device_put(wrap_key(np.array(x), dtype), sharding)
        return jax.device_put(np.array(x, dtype), sharding, may_alias=False)

    def _step(
        self, number: int, feeds: Mapping[Buffer, Array], start: float | None, loaded: Loaded
    ) -> tuple[Event, ...]:
        import jax

        self._load(feeds, loaded)
        loaded.transport.step, interpreter = number, loaded.interpreter
        if start is not None:
            jax.block_until_ready(interpreter.live())
            passed = time.time() - start  # processes share no clock but the wall's
            return tuple(interpreter.measure(time.perf_counter() - passed))
        interpreter.start()
        done = interpreter.advance()
        assert done, "a transport that waits"
        return ()

    def _sizes(self, loaded: Loaded) -> dict[str, Sizes]:
        from autopar.runtime.inprocess import sizes

        return {name: sizes(f.executable) for name, f in loaded.functions.items()}

    def _memory(self) -> tuple[int, int, int]:
        import resource

        from autopar.runtime.held import fullest

        with open("/proc/self/statm", encoding="ascii") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        live = [x for loaded in self._programs.values() for x in loaded.interpreter.live()]
        return fullest(live), resident, most


def _host(x: Array, rows: Sequence[int] | None = None) -> Array:
    """The array, or rows of it, as numpy keeps it; of a typed PRNG key its data."""
    import jax
    import numpy as np

    from autopar.runtime import layout

    whole = np.asarray(jax.random.key_data(x) if layout.is_key(x.dtype) else x)
    return whole if rows is None else whole[list(rows)]
