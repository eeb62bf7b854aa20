"""Processes in which the libraries of stores run, so that none of them runs in the daemon.

What pyarrow, fsspec and their packages do in a process is up to them: one holds the interpreter's
lock while it waits for its server, another one ends the process when an answer is odd, a third one
waits for ever. In a process of its own each of these costs that process and one error.

`store.WorkerStore` is the Store that the daemon has, `pool.Pool` has the processes, and ``python -m
ckptfs._workers`` is what runs in them.

**A worker** belongs to one store of one user: it is told options and credentials once, when it
starts, and opens directories of that store only. Attachments of that store share it. It inherits no
descriptor but its end of the control socket, and the kernel ends it with the daemon.

**A channel** carries one call at a time: a socket (SOCK_SEQPACKET) for messages, and memory
(memfd_create(2)) for the bytes. The daemon makes both and passes the worker's ends through the
control socket; a thread of the worker serves the channel. The daemon copies the bytes from the
memory by preadv(2), which needs no lock of the interpreter, and fails where a worker made the
memory shorter, instead of dying by SIGBUS.

1. The daemon sends a `Call`, with the data of a `put` in the memory.
2. The worker sends `Came` while bytes come, at most one each `PROGRESS_S`.
3. The worker sends `Done` or `Failed`, and the channel is free for the next call. The bytes of a
   read, an object or a listing lie in the memory.

Messages are typed msgpack. A worker that says something else is killed.

**A call ends** in one of these ways, whatever its library does:

- The worker answers.
- The worker dies: the channel reports its end. The call is made again by another worker, if that
  does no harm (all but `put`). After a few tries it fails with `StoreUnavailable`, which names the
  signal.
- The deadline of the caller is over: `StoreTimeout`. The channel is then left behind, with the call
  in it, and is free again when the worker answers after all.
- The caller gives it up (``_store.progress``): likewise.

**A worker is killed** as a whole when one of these holds:

- It was stopped (SIGSTOP): nothing beat for `STOPPED_S`, and the kernel calls it stopped.
- Its interpreter stands still for `PATIENCE` of the time that a call had, and at least `STILL_S`.
  The main thread writes the time into shared memory each `BEAT_S`; it cannot where a library holds
  the lock. Such a library may still get its answer, so the call waits for most of its time, and
  leaves the rest to another try. Calls that are not repeated (listings, `put`) wait for all of it.
- A call was left behind and has not ended `GRACE_S` after its deadline, or more than `LEFT_MAX`
  were. The worker then gets no more calls and is killed when its other ones have ended.
- It has had no call for `IDLE_S`, or its place is needed.

A library that waits for its server with the lock free is none of these: the call waits until its
deadline.

**Deaths in a row** delay the next start: see `pool`.
"""
