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
    from autopar.runtime.inprocess import Sizes
    from autopar.runtime.ray_backend.shipment import Shipment

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


class StageWorker:
    """A Ray actor. Its methods run one after another, and return an `Answer` rather than raise."""

    def __init__(self, setting: Setting):
        if setting.platform == "cpu":
            count = f"--xla_force_host_platform_device_count={setting.devices}"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"  # the last one counts
        import jax
        import ray

        jax.config.update("jax_platforms", setting.platform)
        if setting.cache is not None:
            jax.config.update("jax_compilation_cache_dir", setting.cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        from autopar.runtime.ray_backend.mailbox import Mailbox

        found = jax.devices()
        if len(found) < setting.devices:
            raise RuntimeError(f"{setting.devices} devices are needed, the worker sees {len(found)}")
        self._setting, self._devices = setting, found[: setting.devices]
        host = ray.util.get_node_ip_address()
        self._mailbox = Mailbox(host, f"stage {setting.stage}", setting.secret)
        self._peers: list[tuple[str, int]] = []
        self._failed: Answer | None = None

    def address(self) -> tuple[tuple[str, int], int]:
        """Returns host and port of the mailbox, and the process id."""
        return self._mailbox.address, os.getpid()

    def setup(self, shipment: Shipment) -> Answer:
        """Compiles the shipment; gives the seconds that took."""
        return self._try(lambda: self._setup(shipment))

    def connect(self, addresses: Sequence[tuple[str, int]]) -> Answer:
        """Tells where all stages' mailboxes are."""
        self._peers = [a for s, a in enumerate(addresses) if s != self._setting.stage]
        self._transport.addresses = addresses
        return Answer()

    def load(self, arrays: Mapping[Buffer, Array]) -> Answer:
        """Puts arrays (numpy; of a typed PRNG key its data) into buffers."""
        return self._try(lambda: self._load(arrays))

    def step(self, number: int, feeds: Mapping[Buffer, Array], start: float | None = None) -> Answer:
        """Runs one step. start: `time.time()` from which its events are to be measured; gives them."""
        return self._try(lambda: self._step(number, feeds, start))

    def fetch(self, buffers: Sequence[Buffer]) -> Answer:
        """Gives whole numpy arrays (of a typed PRNG key its data)."""
        return self._try(lambda: [_host(x) for x in self._interpreter.fetch(buffers)])

    def hlo(self) -> Answer:
        """Gives segment → compiled text."""
        return self._try(lambda: {name: f.as_text() for name, f in self._functions.items()})

    def sizes(self) -> Answer:
        """Gives segment → the compiler's bytes."""
        return self._try(self._sizes)

    def memory(self) -> Answer:
        """Gives (bytes held on the fullest device, resident bytes of this process)."""
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
        self._mailbox.abort(self._peers, self._failed.error or "")
        if hasattr(self, "_interpreter"):
            self._interpreter.clear()
        return self._failed

    def _words(self, error: Exception) -> str:
        said = f"{type(error).__name__}: {str(error)[:500]}"
        if not hasattr(self, "_interpreter"):
            return said
        at, instructions = self._interpreter.at, self._interpreter.worker.instructions
        return f"{said} at {str(instructions[at])[:120]}" if at < len(instructions) else said

    def _setup(self, shipment: Shipment) -> float:
        from autopar.runtime import layout
        from autopar.runtime.interpreter import Interpreter
        from autopar.runtime.ray_backend.shipment import load
        from autopar.runtime.ray_backend.transport import TileTransport

        begun, stage = time.perf_counter(), self._setting.stage
        self._slots, meshes = shipment.slots[stage], shipment.meshes
        self._jmesh = layout.jax_mesh(meshes[stage], self._devices)
        self._functions = {blob.name: load(blob, self._jmesh) for blob in shipment.blobs}
        self._transport = TileTransport(
            stage, meshes, shipment.slots, self._jmesh, self._mailbox, self._setting.timeout
        )
        self._interpreter = Interpreter(shipment.worker, self._functions, self._transport, self._sharding)
        return time.perf_counter() - begun

    def _sharding(self, buffer: Buffer) -> Any:
        from autopar.runtime import layout

        return layout.slot_sharding(self._jmesh, self._slots[buffer.value])

    def _load(self, arrays: Mapping[Buffer, Array]) -> None:
        self._interpreter.load({b: self._place(b, x) for b, x in arrays.items()})

    def _place(self, buffer: Buffer, x: Array) -> Array:
        """A copy on the devices: what is donated later must not share memory with the message it came in."""
        import jax
        import numpy as np

        from autopar.runtime import layout
        from autopar.runtime.ray_backend.transport import wrap_key

        dtype = layout.as_dtype(self._slots[buffer.value].dtype)
        if layout.is_key(dtype):
            return jax.device_put(wrap_key(np.array(x), dtype), self._sharding(buffer))
        return jax.device_put(np.array(x, dtype), self._sharding(buffer), may_alias=False)

    def _step(self, number: int, feeds: Mapping[Buffer, Array], start: float | None) -> tuple[Event, ...]:
        import jax

        self._load(feeds)
        self._transport.step = number
        if start is not None:
            jax.block_until_ready(self._interpreter.live())
            passed = time.time() - start  # processes share no clock but the wall's
            return tuple(self._interpreter.measure(time.perf_counter() - passed))
        self._interpreter.start()
        done = self._interpreter.advance()
        assert done, "a transport that waits"
        return ()

    def _sizes(self) -> dict[str, Sizes]:
        from autopar.runtime.inprocess import sizes

        return {name: sizes(f) for name, f in self._functions.items()}

    def _memory(self) -> tuple[int, int]:
        from autopar.runtime.inprocess import fullest

        with open("/proc/self/statm", encoding="ascii") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return fullest(self._interpreter.live()), resident


def _host(x: Array) -> Array:
    """The array as numpy keeps it; of a typed PRNG key its data."""
    import jax
    import numpy as np

    from autopar.runtime import layout

    return np.asarray(jax.random.key_data(x) if layout.is_key(x.dtype) else x)
