"""The worker process of one stage: it loads its shipment and interprets its program, one call per step."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autopar.core.program import Buffer
from autopar.core.timeline import Event

Array = Any


@dataclass(frozen=True)
class Answer:
    """What a worker returns for a step: nothing, or why it failed. peer: because another worker did."""

    error: str | None = None
    peer: bool = False
    events: tuple[Event, ...] = ()


@dataclass(frozen=True)
class Setting:
    """How a worker process is set up.

    Attributes:
        devices: how many it has; on a CPU they are emulated.
        platform: "cpu" or "cuda". secret: of the session. host: where its mailbox listens.
        timeout: seconds a receive waits. cache: folder of compiled programs that the workers share.
    """

    stage: int
    devices: int
    platform: str
    secret: bytes
    host: str
    timeout: float
    cache: str


class StageWorker:
    """A Ray actor. Its methods run one after another."""

    def __init__(self, setting: Setting):
        if setting.platform == "cpu":
            os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={setting.devices}"
        import jax

        jax.config.update("jax_platforms", setting.platform)
        jax.config.update("jax_compilation_cache_dir", setting.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        from autopar.runtime.ray_backend.mailbox import Mailbox

        self._setting, self._devices = setting, jax.devices()[: setting.devices]
        self._mailbox = Mailbox(setting.host, f"stage {setting.stage}", setting.secret)
        self._failed: Answer | None = None

    def address(self) -> tuple[str, int, int, int]:
        """Returns (host, port) of the mailbox, the number of devices, and the process id."""
        return (*self._mailbox.address, len(self._devices), os.getpid())

    def setup(self, shipment: Any, addresses: Sequence[tuple[str, int]]) -> float:
        """Compiles the shipment; returns the seconds that took."""
        from autopar.runtime import layout
        from autopar.runtime.interpreter import Interpreter
        from autopar.runtime.ray_backend.shipment import load
        from autopar.runtime.ray_backend.transport import TileTransport

        start, stage = time.perf_counter(), self._setting.stage
        self._jmesh = layout.jax_mesh(shipment.meshes[stage], self._devices)
        self._slots, self._peers = shipment.slots[stage], [a for s, a in enumerate(addresses) if s != stage]
        self._functions = {blob.name: load(blob, self._jmesh) for blob in shipment.blobs}
        self._transport = TileTransport(
            stage,
            shipment.meshes,
            shipment.slots,
            self._jmesh,
            self._mailbox,
            addresses,
            self._setting.timeout,
        )
        self._interpreter = Interpreter(shipment.worker, self._functions, self._transport, self._sharding)
        return time.perf_counter() - start

    def _sharding(self, buffer: Buffer) -> Any:
        from autopar.runtime import layout

        return layout.slot_sharding(self._jmesh, self._slots[buffer.value])

    def load(self, arrays: Mapping[Buffer, Array]) -> None:
        """Puts arrays (numpy; of a typed PRNG key its data) into buffers."""
        self._interpreter.load({b: self._place(b, x) for b, x in arrays.items()})

    def _place(self, buffer: Buffer, x: Array) -> Array:
        """A copy on the devices: what is donated later must not share memory with the message it came in."""
        import jax
        import numpy as np

        from autopar.runtime import layout

        dtype = layout.as_dtype(self._slots[buffer.value].dtype)
        if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            return jax.device_put(
                jax.random.wrap_key_data(np.array(x), impl=dtype._impl.name), self._sharding(buffer)
            )
        return jax.device_put(np.array(x, dtype), self._sharding(buffer), may_alias=False)

    def step(self, number: int, feeds: Mapping[Buffer, Array], measured: bool = False) -> Answer:
        """Runs one step; whatever goes wrong is told to the peers and returned."""
        if self._failed is not None:
            return self._failed
        from autopar.runtime.ray_backend.mailbox import PeerFailed

        try:
            self.load(feeds)
            self._transport.step = number
            if measured:
                return Answer(events=tuple(self._interpreter.measure(time.perf_counter())))
            self._interpreter.start()
            self._interpreter.advance()
            return Answer()
        except PeerFailed as error:
            self._failed = Answer(str(error), peer=True)
        except Exception as error:
            self._failed = Answer(self._words(error))
        self._mailbox.abort(self._peers, self._failed.error or "")
        self._interpreter.clear()
        return self._failed

    def _words(self, error: Exception) -> str:
        at = self._interpreter.at
        instructions = self._interpreter.worker.instructions
        where = f" at {str(instructions[at])[:120]}" if at < len(instructions) else ""
        return f"{type(error).__name__}: {str(error)[:500]}{where}"

    def fetch(self, buffers: Sequence[Buffer]) -> list[Array] | Answer:
        """Returns whole numpy arrays (of a typed PRNG key its data), or why there are none."""
        import jax
        import numpy as np

        if self._failed is not None:
            return self._failed
        arrays = self._interpreter.fetch(buffers)
        keys = [jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in arrays]
        return [np.asarray(jax.random.key_data(x) if k else x) for x, k in zip(arrays, keys)]

    def hlo(self) -> dict[str, str]:
        return {name: f.as_text() for name, f in self._functions.items()}

    def compiled(self) -> dict[str, tuple[int, int, int, int]]:
        """Returns per segment the compiler's (arguments, outputs, temporary, aliased) bytes."""
        found: dict[str, tuple[int, int, int, int]] = {}
        for name, f in self._functions.items():
            m = f.memory_analysis()
            sizes = (
                m.argument_size_in_bytes,
                m.output_size_in_bytes,
                m.temp_size_in_bytes,
                m.alias_size_in_bytes,
            )
            found[name] = sizes
        return found

    def memory(self) -> tuple[int, int]:
        """Returns (bytes held on the fullest device, resident bytes of this process)."""
        held: dict[Any, int] = {}
        for x in self._interpreter.live():
            for shard in x.addressable_shards:
                held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
        with open("/proc/self/statm", encoding="ascii") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return max(held.values(), default=0), resident

    def close(self) -> None:
        """Says goodbye to the peers."""
        self._mailbox.close()
