"""What conversations leave behind, found again by how the next prompt begins."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ...cache_armt import ARMTCache


@dataclass(eq=False)
class Session:
    """
    One conversation.

    Attributes:
        ids: `(T,)` all ids it has read, those of the last reply included.
        prompt_length: ids before the last reply.
        memories: what was left behind, by the number of ids that had been read. A memory cannot go back, so there is
            one where the last turn began, one before its reply and one after.
        branches: the same of places where other conversations went another way, which last as long as this one.
        owner: the client whose conversation it is; nobody else's goes on from it.
    """

    ids: torch.Tensor
    prompt_length: int
    memories: dict[int, ARMTCache]
    branches: dict[int, ARMTCache]
    owner: str = ""


@dataclass
class Start:
    """
    Where a prompt goes on from.

    Attributes:
        length: ids of the prompt that need not be read.
        cache: the memory after these; an empty one for 0.
        shared: ids at the prompt's start that some conversation has read too.
        session: the conversation that the prompt goes on with; None if it is a new one.
        branches: memories of the prompt's places where conversations went different ways, by length.
    """

    length: int = 0
    cache: ARMTCache = field(default_factory=ARMTCache)
    shared: int = 0
    session: Session | None = None
    branches: dict[int, ARMTCache] = field(default_factory=dict)


class Sessions:
    """
    The conversations whose memory is kept. When there are too many, the one not used for longest is forgotten: it can
    go on all the same, but is read afresh.

    Args:
        max_sessions: conversations to keep.
        max_bytes: bytes that their memories may take together.
        decode: turns ids into text. If given, a reply may come back in other ids, as long as they say the same: the
            memory is then that of the ids which were generated, and what follows may differ from a text read afresh.
    """

    def __init__(self, max_sessions: int, max_bytes: int, decode: Callable[[list[int]], str] | None = None):
        self.max_sessions, self.max_bytes, self.decode = max_sessions, max_bytes, decode
        self._sessions: list[Session] = []  # by last use

    def __len__(self) -> int:
        return len(self._sessions)

    def find(self, prompt: torch.Tensor, owner: str = "") -> Start:
        """
        The memory of this owner that spares most of a `(T,)` prompt. The prompt's last id is always read: that says
        what comes next.
        """
        start, used, most_shared = Start(), None, 0
        for session in [session for session in self._sessions if session.owner == owner]:
            end = len(session.ids)
            shared = common_length(session.ids, prompt)
            most_shared = max(most_shared, min(shared, len(prompt) - 1))
            memories = session.branches | session.memories
            spared = {length: length for length in memories if length <= shared}
            if self.decode and end in memories and session.prompt_length <= shared < end:
                spared[end] = self._retold(session, prompt)
            for length, ids in spared.items():
                if start.length < ids < len(prompt):
                    used, memory = session, memories[length]
                    branches = {n: branch for n, branch in session.branches.items() if n < length}
                    if length == end:
                        start = Start(ids, memory, session=session, branches=branches)
                    else:
                        start = Start(ids, memory, branches={**branches, ids: memory})
        if used is not None:
            self._sessions.remove(used)
            self._sessions.append(used)
        start.shared = most_shared
        return start

    def keep(self, session: Session, instead_of: Session | None = None) -> None:
        """Keeps a conversation, in the place of what it was before, and forgets others if there are too many."""
        if instead_of in self._sessions:
            self._sessions.remove(instead_of)
        self._sessions.append(session)
        while len(self) > self.max_sessions or (self._sessions and self.num_bytes() > self.max_bytes):
            del self._sessions[0]

    def num_bytes(self) -> int:
        """Bytes of all memories; what several have in common counts once."""
        caches = [cache for each in self._sessions for cache in (*each.memories.values(), *each.branches.values())]
        storages = [tensor.untyped_storage() for cache in caches for tensor in tensors_of(cache)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def _retold(self, session: Session, prompt: torch.Tensor) -> int:
        """
        How many ids of the prompt, which begins like the session's, say the same as all of the session's; 0 if none
        do. A reply comes back as text, which a tokenizer may cut into other ids than those that were generated: then
        the model has read this text already, in its own words.
        """
        reply = self.decode(session.ids[session.prompt_length :].tolist())
        rest = prompt[session.prompt_length : session.prompt_length + len(reply.encode()) + 1].tolist()
        count = bisect_left(range(len(rest) + 1), len(reply), key=lambda n: len(self.decode(rest[:n])))
        # Half a character, shown as U+FFFD, could be half of any.
        same = count <= len(rest) and self.decode(rest[:count]) == reply and "\ufffd" not in reply
        return session.prompt_length + count if same else 0


def common_length(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many ids `(T,)` and `(U,)` have in common at their start."""
    length = min(len(a), len(b))
    differs = (a[:length] != b[:length]).nonzero()
    return int(differs[0]) if len(differs) else length


def tensors_of(cache: ARMTCache) -> list[torch.Tensor]:
    """The tensors of a memory."""
    tensors = [cache.last_hidden]
    for state in cache.states.values():
        tensors += [] if state is None else [state.A, state.z]
    for layer in [] if cache.keys is None else cache.keys.layers:
        tensors += [layer.keys, layer.values]
    return [tensor for tensor in tensors if tensor is not None]
