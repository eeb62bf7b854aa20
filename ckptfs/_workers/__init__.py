"""Processes for the libraries of stores, so that no library runs in the daemon, and for long reads.

pyarrow, fsspec and their packages may misbehave. One holds the interpreter's lock while it waits
for its server, another ends the process when an answer is odd, and a third waits for ever. In a
process of its own, each of these costs that process and one error.

The daemon uses `store.WorkerStore` as the Store. `pool.Pool` has the processes, and each runs
``python -m ckptfs._workers``. Workers with our own clients share the reads of a busy daemon (see
`spread`).

**A worker** belongs to one store of one user. It gets options and credentials once, when it starts,
and opens only directories of that store. Attachments of that store share it. It inherits only its
end of the control socket, and the kernel ends it with the daemon.

**A channel** carries one call at a time. It has a socket (SOCK_SEQPACKET) for messages, and memory
(memfd_create(2)) for the bytes. The daemon makes both, and passes the worker's ends through the
control socket. A thread of the worker serves the channel. The daemon copies the bytes from the
memory by preadv(2), which does not need the interpreter's lock. If a worker has shortened the
memory, preadv(2) fails, while a mapping would end the daemon by SIGBUS.

1. The daemon sends a `Call`, with the data of a `put` in the memory.
2. The worker sends `Came` while bytes come, at most one each `PROGRESS_S`.
3. The worker sends `Done` or `Failed`, and the channel is free for the next call. The bytes of a
   read, an object or a listing lie in the memory.

Messages are typed msgpack. The pool kills a worker that sends anything else.

**A call ends** in one of these ways, whatever its library does:

- The worker answers.
- The worker dies, and the channel reports its end. Another worker makes the call again if that does
  no harm (all methods but `put`). After a few tries, the call fails with `StoreUnavailable`, which
  names the signal.
- The deadline of the caller is over, and the call fails with `StoreTimeout`. The channel is then
  left behind with the call in it. It is free again when the worker answers after all.
- The caller gives the call up (``_store.request_context``). The channel is left behind as well.

A channel to one of our own clients is closed instead of left behind. The worker's main thread
notices that, and gives the request up.

**The pool kills a worker** in one of these cases:

- A user or debugger has stopped the worker (SIGSTOP): it has not beaten for `STOPPED_S`, and the
  kernel reports it as stopped.
- Its interpreter is blocked for `PATIENCE` of the time that a call had, and at least `STILL_S`. The
  main thread writes the time into shared memory each `BEAT_S`, which it cannot do while a library
  holds the lock. Such a library may still get its answer, so the call waits for most of its time,
  and leaves the rest to another try. Calls without another try (listings, `put`) wait for all of
  it.
- A call was left behind and has not ended `GRACE_S` after its deadline, or more than `LEFT_MAX`
  calls were left behind. The worker then gets no more calls, and is killed when its others have
  ended.
- It has had no call for `IDLE_S`, or another group needs its place.

If a library waits for its server without the lock, the worker lives, and the call waits until its
deadline.

**Deaths in a row** delay the next start: see `pool`.
"""
