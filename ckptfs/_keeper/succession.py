"""How keepers with ``--take-over`` follow each other on one mount, for example when Kubernetes
replaces the daemon's pod (`ckptfs._os.takeover` is the protocol).

**Which keeper owns the mount.**

- A keeper that starts asks the owner for the mount, and gets it. It has imported a daemon's modules
  before the owner's daemon ends, so processes see a short pause.
- A former owner stays, without a daemon, until SIGTERM. Its pod then ends as it should, and until
  then Kubernetes does not start its container again, which would ask for the mount.
- A former owner waits for the end of its successor. If that ends by a signal, the former owner gets
  the mount back, so a rollback is a pause, too. If it is killed, the former owner starts a new
  mount.
- A keeper that starts also waits, instead of asking, if its container has owned the mount before:
  the container of an old pod was started again, and must not take the mount from the newer pod. The
  container's name decides (`takeover.name_of_container`). Pods in the network of the node share its
  name, so there each start takes the mount over.
- A keeper that cannot take the mount over waits, too: if the kernel cannot repeat requests, if the
  state has another layout, if it does not see the mount, or if the owner runs without
  ``--take-over``. It starts a new mount after the owner's end.

**The configuration** is that of the new keeper. Only `allow_other` is the mount's, and a cache that
is not configured is the former keeper's.
"""

import logging
import os
import time
from importlib.metadata import version as version_of

import msgspec

from ckptfs._config.load import Loaded
from ckptfs._keeper import launch, places
from ckptfs._keeper.mount_keeper import Keeper
from ckptfs._keeper.mount_state import MountOffer, taken_from
from ckptfs._model.config import Config
from ckptfs._mount import session
from ckptfs._os import takeover
from ckptfs._os.filelock import wait_unlocked
from ckptfs._os.takeover import Claim, Offered, Refusal, Refused

log = logging.getLogger(__name__)

_VERSION = version_of("ckptfs")
_PAUSE_S = 0.1
"""Time between two claims, if the owner is about to change."""
_SILENT_S = 5.0
"""A keeper that has the lock for so long, and does not answer, hands nothing over."""


def take_over(keeper: Keeper, loaded: Loaded, *, waits: bool) -> bool:
    """Let `keeper` continue the mount of another keeper, as soon as that one hands it over.

    Args:
        keeper: A keeper that has not started.
        loaded: Its configuration.
        waits: Whether this process has owned the mount before.

    Returns False as soon as no keeper has the mount, so `keeper` may start. Raises PlaceUnusable,
    DaemonError and the errors that a daemon's start reports; then the other keeper goes on.
    """
    path = places.takeover_path(loaded.config)
    said = ""
    answered_s = time.monotonic()
    while True:
        found = takeover.claim(path, Claim(takeover.name_of_container(), _VERSION, waits))
        if isinstance(found, Offered):
            found = _accept(keeper, loaded, found)
        if found == "":
            return True
        if found is None:
            if _is_free(loaded.config):
                return False
            if time.monotonic() < answered_s + _SILENT_S:  # a new owner is about to listen
                time.sleep(_PAUSE_S)
                continue
            found = Refused("it does not hand its mount over")
        else:
            answered_s = time.monotonic()
        if isinstance(found, Refused):
            waits = waits or found.lasting
            if found.reason != said:
                log.warning(
                    "cannot take over from the keeper at %s: %s; waiting for its end",
                    loaded.config.socket,
                    found.reason,
                )
            said = found.reason
        time.sleep(_PAUSE_S)


def _is_free(config: Config) -> bool:
    """Whether no keeper has the lock of the socket."""
    try:
        return wait_unlocked(places.lock_path(config), 0)
    except OSError:  # the directory is missing, for example; the start reports it
        return True


def _accept(keeper: Keeper, loaded: Loaded, offered: Offered) -> "Refused | str":
    """Take the offered mount over. Returns "" if `keeper` owns it now, and a refusal if the other
    keeper goes on."""
    used: set[int] = set()
    try:
        offer = msgspec.json.decode(offered.state, type=MountOffer)
        config = _config_for(loaded, offer)
        mount = places.as_mounted(config)
        if session.device_of_mount(mount) != offer.device:
            raise Refusal(
                f"its mount is not at {mount} here; mount the same directory of the node there "
                "(Kubernetes: mountPropagation: Bidirectional)"
            )
        held = taken_from(offer, offered.fds, config)
        launch.make_directories(config)
        why_not = keeper.take_over(held, offered)
        if why_not:
            return Refused(why_not)
        used = set(held.fds())
    except (msgspec.DecodeError, Refusal) as error:
        reason = f"{error}" if isinstance(error, Refusal) else f"its state is unknown: {error}"
        offered.refuse(reason)
        return Refused(reason, lasting=True)
    finally:
        for fd in offered.fds.values():
            if fd not in used:
                os.close(fd)
    log.info("took over the mount %s from %s", mount, offer.former[-1:] or "another keeper")
    return ""


def _config_for(loaded: Loaded, offer: MountOffer) -> Config:
    config = msgspec.structs.replace(loaded.config, allow_other=offer.allow_other)
    if loaded.sources["cache_dir"] == "default":
        config = msgspec.structs.replace(config, cache_dir=offer.cache_dir)
    if offer.allow_other != loaded.config.allow_other:
        log.warning(
            "the mount stays with allow_other = %s until it ends", str(offer.allow_other).lower()
        )
    return config
